"""The model card (README.md) of a donor repo: typed metadata and a rendered template."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from not_hf.errors import NotHFError

if TYPE_CHECKING:
    from not_hf.config import DonorConfig

LIBRARY = "not_hf"
TAGS = ("not-hf", "neural-organ-transplantation", "arxiv:2601.13580")

_TEMPLATE = Path(__file__).parent / "templates" / "donor_card.md"
_FACTS = re.compile(r"<!-- not_hf facts:.*?<!-- /not_hf facts -->", re.DOTALL)
_DATA_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".zst")

logger = logging.getLogger(__name__)


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
    base = _hub_id(config.base_model_name_or_path)
    if base is None and config.base_model_name_or_path:
        _warn_once(
            f"the model card names no base_model: {config.base_model_name_or_path!r} is not a Hub ID; "
            "cut the organ from its base's Hub ID if people are to find it by its base"
        )
    base_name = base or os.path.basename(os.path.normpath(config.base_model_name_or_path or "an unnamed model"))
    title = repo_id.rpartition("/")[2] if repo_id else f"{base_name.rpartition('/')[2]}-organ"
    measured = list(_measurements(config.metrics or {}))
    eval_results = [_eval_result(m, config) for m in measured if math.isfinite(m.value)]
    data = ModelCardData(
        library_name=LIBRARY,
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag="text-generation",
        tags=[*TAGS, *([f"base_model:adapter:{base}"] if base else [])],
        datasets=[name for name in config.datasets or [] if _hub_id(name) and not name.endswith(_DATA_FILES)] or None,
        model_name=title if eval_results else None,
        eval_results=eval_results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=title,
        base=base,
        base_name=base_name,
        base_url=f"https://huggingface.co/{base}" if base else None,
        base_code=json.dumps(base or f"path/to/{base_name}"),
        donor_code=json.dumps(repo_id or "."),
        is_folder=repo_id is None,
        config=config,
        domain=_cell(config.domain) if config.domain else None,
        picture=None if config.donors else _picture(config),
        facts=_facts(config, num_parameters, size),
        organs=[{key: _cell(value) for key, value in _located(entry).items()} for entry in config.donors or []],
        measured=[_measured_row(m) for m in measured],
    )


def updated_card(
    folder: str | os.PathLike[str],
    config: DonorConfig,
    num_parameters: int | None = None,
    size: int | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card for a donor's folder. Nothing is written.

    A `README.md` that is already there keeps its text and its metadata: only the facts between the two
    `not_hf facts` comments are rewritten, our metadata keys are set, and tags, datasets and results united.

    Args:
        folder: Of the donor.
        config: As in `donor_card`, like the other arguments.

    Raises:
        NotHFError: The metadata of the README.md that is there cannot be read.
    """
    path = Path(folder, "README.md")
    card = donor_card(config, num_parameters, size, repo_id)
    if not path.exists():
        return card
    try:
        existing = ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise NotHFError(f"{path} has metadata that cannot be read ({reason}); mend or remove it") from error
    _update(existing, card)
    return existing


def write_card(folder: str | os.PathLike[str], config: DonorConfig, *args: Any, **kwargs: Any) -> None:
    """Write `updated_card` to `folder/README.md`."""
    updated_card(folder, config, *args, **kwargs).save(Path(folder, "README.md"))


def _update(card: ModelCard, new: ModelCard) -> None:
    """Bring `card` up to `new`, keeping what people wrote into it."""
    if found := _FACTS.search(new.text):
        facts = found.group()
        card.text = _FACTS.sub(lambda _: facts, card.text, count=1)
    old, ours = cast(ModelCardData, card.data), cast(ModelCardData, new.data)
    tags, datasets = _listed(old.tags), _listed(old.datasets)
    if ours.base_model:
        # those of the base it had before go
        tags = [tag for tag in tags if not tag.startswith("base_model:") or tag in _listed(ours.tags)]
    results = [
        result
        for result in old.eval_results or []
        if not any(result.is_equal_except_value(other) for other in ours.eval_results or [])
    ] + (ours.eval_results or [])
    name = old.get("model_name") or ours.get("model_name")
    for key, value in ours.__dict__.items():
        if value is not None:
            old[key] = value
    old.tags = list(dict.fromkeys([*tags, *_listed(ours.tags)]))
    old.datasets = list(dict.fromkeys([*datasets, *_listed(ours.datasets)])) or None
    old.eval_results, old.model_name = results or None, name


def _hub_id(name: str | None) -> str | None:
    """`name` when it can be a Hub ID and is nothing local."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


@functools.cache  # once per base: training saves often
def _warn_once(message: str) -> None:
    logger.warning(message)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _measurements(metrics: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Measurement]:
    """The numbers in `metrics`, however nested; `{"before": x, "after": y}` is one measurement."""
    name = " ".join(path).replace("_", " ")
    if _is_number(metrics.get("before")) and _is_number(metrics.get("after")):
        yield Measurement(name or "value", float(metrics["after"]), float(metrics["before"]))
        metrics = {key: value for key, value in metrics.items() if key not in ("before", "after")}
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _measurements(value, (*path, key))
        elif _is_number(value):
            yield Measurement(f"{name} {key}".strip().replace("_", " "), float(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _eval_result(measurement: Measurement, config: DonorConfig) -> EvalResult:
    """The value after the transplant, on the text its name speaks of."""
    words = measurement.name.split()
    metric = "perplexity" if "perplexity" in words else "_".join(words)
    text = " ".join(word for word in words if word != metric) if metric == "perplexity" else ""
    return EvalResult(
        task_type="text-generation",
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
        "name": _cell(name),
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
        ("Cut with", f"not_hf {config.not_hf_version}" if config.not_hf_version else None),
    ]
    return [(name, _cell(value)) for name, value in rows if value]


def _located(entry: dict[str, Any]) -> dict[str, Any]:
    """One organ of a composition: its name, where its files are and where it goes."""
    source = entry.get("donor") or entry.get("subfolder")
    if entry.get("donor") and entry.get("revision"):
        source = f"{source} at {entry['revision']}"
    return {
        **{key: entry.get(key, "–") for key in ("name", "position", "mode", "scale")},
        "source": source or "–",
    }


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


def _cell(value: Any) -> str:
    """One line without a column separator."""
    return " ".join(str(value).split()).replace("|", "\\|")
