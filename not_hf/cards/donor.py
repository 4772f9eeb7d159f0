"""The model card (README.md) of a donor repo: typed metadata and a rendered template."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from not_hf.architecture.stack import task_of
from not_hf.cards.common import (
    ADAPTER_TAG,
    DONOR_TAG,
    LIBRARY,
    METHOD_TAGS,
    README,
    cell,
    hub_id,
    linked,
    load,
    named_base,
    short_name,
    updated,
    without_facts,
)
from not_hf.cards.license import License
from not_hf.config import DonorConfig
from not_hf.errors import NotHFError

_TEMPLATE = Path(__file__).parent / "templates" / "donor_card.md"
_DATA_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".zst")


class Measurement(NamedTuple):
    """One number of `DonorConfig.metrics`, and its value before the transplant if that was measured too."""

    name: str
    value: float
    before: float | None = None


def donor_card(
    config: DonorConfig,
    num_parameters: int | None = None,
    size: int | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Render the card of a donor.

    Args:
        config: What the organ is; its `metrics` become the card's numbers and its model-index.
        num_parameters: Number of parameters in the organ.
        size: Of its weights, in bytes.
        repo_id: Where the card is going to lie; `None` writes its code for someone who stands in the folder.
    """
    base = named_base(config.base_model_name_or_path)
    base_name = base or short_name(config.base_model_name_or_path)
    is_encoder = (task := _task(config)) == "fill-mask"
    title = short_name(repo_id) if repo_id else f"{short_name(base_name)}-organ"
    measured = list(_measurements(config.metrics or {}))
    eval_results = [_eval_result(m, config) for m in measured if math.isfinite(m.value)]
    data = ModelCardData(
        library_name=LIBRARY,
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag=task,
        tags=[DONOR_TAG, *METHOD_TAGS, *([f"{ADAPTER_TAG}{base}"] if base else [])],
        datasets=hub_datasets(config) or None,
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
        **License.of(config).metadata(),
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=title,
        base=base,
        base_name=base_name,
        base_link=linked(config.base_model_name_or_path),
        base_code=json.dumps(base or f"path/to/{base_name}"),
        donor_code=json.dumps(repo_id or "."),
        is_folder=repo_id is None,
        config=config,
        is_encoder=is_encoder,
        head="MaskedLM" if is_encoder else "CausalLM",
        domain=cell(config.domain) if config.domain else None,
        picture=None if config.donors else _picture(config),
        facts=_facts(config, num_parameters, size),
        organs=[{key: cell(value) for key, value in _located(entry).items()} for entry in config.donors or []],
        measured=[_measured_row(m) for m in measured],
    )


def updated_card(
    folder: str | os.PathLike[str],
    config: DonorConfig,
    num_parameters: int | None = None,
    size: int | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card for a donor's folder: a new one, or the `README.md` that is there, brought up to it.

    Nothing is written. What is kept of a `README.md` says `readme.updated`.

    Args:
        folder: Of the donor.
        config: As in `donor_card`, like the other arguments.

    Raises:
        NotHFError: The metadata of the README.md that is there cannot be read.
    """
    return _updated(Path(folder, README), donor_card(config, num_parameters, size, repo_id), repo_id)


def _updated(path: Path, new: ModelCard, repo_id: str | None) -> ModelCard:
    """`readme.updated`; but a text in which nobody wrote gives way to the new one, whole."""
    card = updated(path, new)
    if path.exists() and _is_untouched(path, repo_id):
        card.text = new.text
    return card


def _is_untouched(path: Path, repo_id: str | None) -> bool:
    """Whether a card's text is what the config beside it gives, so that it speaks of that organ and no other."""
    try:
        config = DonorConfig.from_pretrained(path.parent)
    except (NotHFError, OSError):  # there is none, or it is of something else
        return False
    text = without_facts(load(path).text)
    return any(text == without_facts(donor_card(config, repo_id=name).text) for name in (repo_id, None))


def pushed_card(
    folder: str | os.PathLike[str],
    published: str | os.PathLike[str],
    config: DonorConfig,
    num_parameters: int | None,
    size: int | None,
    repo_id: str,
) -> ModelCard:
    """The card to push beside a donor's files. Nothing is written.

    The text is that of the folder's `README.md` if its author wrote into it, else that of the published one; the
    metadata is that of both.

    Args:
        folder: Of the donor.
        published: The `README.md` that the repo has; there need not be one.
        config: As in `donor_card`, like the other arguments.

    Raises:
        NotHFError: The metadata of a README.md cannot be read.
    """
    new, own = donor_card(config, num_parameters, size, repo_id), Path(folder, README)
    here, there = without_facts(donor_card(config).text), without_facts(new.text)
    if not own.exists() or without_facts(load(own).text) == here:
        return _updated(Path(published), new, repo_id)
    card = updated(own, new)
    for line, line_there in zip(here.splitlines(), there.splitlines(), strict=True):
        if line != line_there:  # names the folder
            card.text = card.text.replace(line, line_there)
    card.data = updated(published, card).data
    return card


def _task(config: DonorConfig) -> str:
    """The Hub's name for what a model with this organ does."""
    with contextlib.suppress(NotHFError):  # a config that cannot be read still gets a card
        return task_of(config.native_config("base_config"))
    return "text-generation"


def hub_datasets(config: DonorConfig) -> list[str]:
    """Those of the training datasets that are on the Hub."""
    return [name for name in config.datasets or [] if hub_id(name) and not name.endswith(_DATA_FILES)]


def _measurements(metrics: dict[str, Any]) -> Iterator[Measurement]:
    """The numbers in `metrics`, however nested; two that differ only in "before" and "after" are one measurement."""
    numbers = dict(_numbers(metrics))

    def twin(path: tuple[str, ...], here: str, there: str) -> float | None:
        return numbers.get(tuple(there if key == here else key for key in path)) if here in path else None

    for path, value in numbers.items():
        if twin(path, "before", "after") is not None:
            continue
        before = twin(path, "after", "before")
        name = path if before is None else [key for key in path if key != "after"]
        yield Measurement(" ".join(name).replace("_", " ") or "value", value, before)


def _numbers(metrics: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, str(key)))
        elif _is_number(value):
            yield (*path, str(key)), float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _eval_result(measurement: Measurement, config: DonorConfig) -> EvalResult:
    """The value after the transplant, on the text its name speaks of."""
    words = measurement.name.split()
    metric = "perplexity" if "perplexity" in words else "_".join(words)
    text = " ".join(word for word in words if word != metric) if metric == "perplexity" else ""
    return EvalResult(
        task_type=_task(config),
        dataset_type=text.replace(" ", "-") or "evaluation",  # the key by which a model-index groups its numbers
        dataset_name=(text == "domain" and config.domain) or text or "evaluation",
        metric_type=metric,
        metric_name=measurement.name,
        metric_value=measurement.value,
    )


def _measured_row(measurement: Measurement) -> dict[str, str]:
    name, value, before = measurement
    change = f"{(value / before - 1) * 100:+.1f} %" if before else "–"
    return {
        "name": cell(name),
        "before": "–" if before is None else f"{before:.4g}",
        "after": f"{value:.4g}",
        "change": change,
    }


def _facts(config: DonorConfig, num_parameters: int | None, size: int | None) -> list[tuple[str, str]]:
    """The rows of the card's table: what is known, in reading order."""
    base_config = config.base_config or {}
    rows: list[tuple[str, str | None]] = [("Architecture", base_config.get("model_type"))]
    if config.layers is not None:
        i, j = config.layers
        rows += [
            ("Layers", f"`[{i}, {j})` of the base: {j - i} layer{'s' if j - i > 1 else ''}, counted from 0"),
            ("Position", f"{config.position}, counted in the recipient's own layers"),
            ("Mode", f"`{config.mode}`"),
            ("Started as", {"copy": "the layers as cut", "identity": "an exact no-op"}.get(config.init)),
        ]
    rows += [
        ("Parameters", None if num_parameters is None else f"{num_parameters:,}"),
        ("Size", None if size is None else _human_size(size)),
        ("Domain", config.domain),
        ("Training data", ", ".join(config.datasets or []) or None),
        ("Training tokens", None if config.tokens_seen is None else f"{config.tokens_seen:,}"),
        ("Base revision", f"`{config.base_revision}`" if config.base_revision else None),
        ("Base folder", f"`{config.base_subfolder}` in its repo" if config.base_subfolder else None),
        ("Cut with", f"not_hf {config.not_hf_version}" if config.not_hf_version else None),
    ]
    return [(name, cell(value)) for name, value in rows if value]


def _located(entry: dict[str, Any]) -> dict[str, Any]:
    """One organ of a composition: its name, where its files are and where it goes."""
    where = {key: value for key in ("donor", "revision", "subfolder") if (value := entry.get(key))}
    source = where.get("donor") or where.get("subfolder") or "–"
    if repo := hub_id(where.get("donor")):
        path = "/".join([repo, "tree", where.get("revision", "main"), *filter(None, [where.get("subfolder")])])
        source = f"[{repo} at {where.get('revision', 'main')}](https://huggingface.co/{path})"
    name = f"{entry.get('name', '–')}{' (inactive)' if entry.get('active') is False else ''}"
    return {"name": name, "source": source, **{key: entry.get(key, "–") for key in ("position", "mode", "scale")}}


def _picture(config: DonorConfig) -> str | None:
    """Draw the recipient's stack with the organ in it, on the base's own number of layers."""
    if config.layers is None or config.position is None:
        return None
    num_layers = config.native_config("base_config").num_hidden_layers
    num_organ = config.layers[1] - config.layers[0]
    after = config.position + (num_organ if config.mode == "replace" else 0)
    if after > num_layers:  # meant for a deeper recipient
        return None
    organ = f"ORGAN: layers {_span(*config.layers)} of the base"
    if config.mode == "replace":
        organ += f", instead of {_span(config.position, after)}"
    width = max(len(organ), 34) + 2
    border, rule = "─" * width, "═" * width
    own = [
        [f"│ {f'recipient layers {_span(first, last)}':<{width - 1}}│"] if first < last else []
        for first, last in ((0, config.position), (after, num_layers))
    ]
    lines = [
        "  embeddings",
        f"┌{border}┐",
        *own[0],
        f"╞{rule}╡",
        f"│ {organ:<{width - 1}}│",
        f"╞{rule}╡",
        *own[1],
    ]
    return "\n".join([*lines, f"└{border}┘", "  final norm, head"])


def _span(first: int, last: int) -> str:
    return str(first) if last - first == 1 else f"{first} … {last - 1}"


def _human_size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
