"""The model card (README.md) of a donor repo."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from not_hf.architecture.part_names import ALL
from not_hf.architecture.stack import is_encoder
from not_hf.cards.common import (
    ADAPTER_TAG,
    DONOR_TAG,
    LIBRARY,
    METHOD_TAGS,
    README,
    TASKS,
    has_own_text,
    hub_id,
    named_base,
    render,
    short_name,
    updated,
)
from not_hf.cards.license import License
from not_hf.cards.metrics import INTERVAL, KINDS, MEASURED_AT, MEASURED_ON, PRIVACY, place_of
from not_hf.config import DonorConfig
from not_hf.limits import is_of

CURVE = "training_curve.png"  # the plot that `TrainingCurve` writes
_DATA_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".zst")


def donor_card(
    config: DonorConfig,
    num_parameters: int | None = None,
    size: int | None = None,
    repo_id: str | None = None,
    has_curve: bool = False,
) -> ModelCard:
    """Render the card of a donor.

    Args:
        config: Its `metrics` become the card's table of results and its model-index.
        num_parameters: Number of parameters of the donor.
        size: Size of its weights in bytes.
        repo_id: The donor's repo, for the code on the card; `None`: the code runs in the donor's folder.
        has_curve: Whether the plot of its training lies beside the card, and so is shown.
    """
    base = named_base(config.base_model_name_or_path)
    title = short_name(repo_id) if repo_id else f"{short_name(config.base_model_name_or_path)}-organ"
    encodes = bool(config.base_config) and is_encoder(config.native_config("base_config"))
    head = _head(config) or ("MaskedLM" if encodes else "CausalLM")
    task = None if head == "SequenceClassification" else TASKS[f"AutoModelFor{head}"]  # it may be one of tokens
    measured = _measured(config.metrics or {})
    finite = {name: value["after"] for name, value in measured.items() if math.isfinite(value.get("after", math.nan))}
    elsewhere = _measured_elsewhere(config)
    results = [
        _eval_result(name, value, task or "other", config.domain) for name, value in finite.items() if not elsewhere
    ]
    data = ModelCardData(
        library_name=LIBRARY,
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag=task,
        tags=[DONOR_TAG, *METHOD_TAGS, *([f"{ADAPTER_TAG}{base}"] if base else [])],
        datasets=hub_datasets(config) or None,
        model_name=title if results else None,
        eval_results=results or None,
        **License.of(config).metadata(),
    )
    facts: dict[str, Any] = {"config": config, "num_parameters": num_parameters, "size": size, "measured": measured}
    facts |= {
        "head": head,
        "is_encoder": encodes,
        "parts": parts_of_layers(config),
        "beside": beside_layers(config),
        "delta": describe_delta(config),
        "conditions": dict(_conditions(config.metrics or {})),
        "elsewhere": elsewhere,
        "privacy": _privacy(config.metrics or {}),
        "curve": CURVE if has_curve else None,
    }
    return render("donor_card.md", data, title=title, repo_id=repo_id, picture=picture(config), **facts)


def updated_card(
    folder: str | os.PathLike[str],
    config: DonorConfig,
    num_parameters: int | None = None,
    size: int | None = None,
    repo_id: str | None = None,
    published: str | os.PathLike[str] | None = None,
) -> ModelCard:
    """Return the card of a donor's folder: its `README.md` `updated`, or a new one. Nothing is written.

    Args:
        folder: Folder of the donor.
        config: As in `donor_card`, like `num_parameters`, `size` and `repo_id`.
        published: Path of the repo's `README.md`, if any. Its metadata is merged with that of the folder's card, and
            its text is used unless the folder's card has text of its own.

    Raises:
        NotHFError: The metadata of a README.md cannot be read.
    """
    own = Path(folder, README)
    card = updated(own, donor_card(config, num_parameters, size, repo_id, Path(folder, CURVE).exists()))
    if published is None:
        return card
    united = updated(published, card)
    if not has_own_text(own):
        return united
    card.data = united.data
    return card


def parts_of_layers(config: DonorConfig) -> str:
    """Name what a donor holds of each layer, in Markdown; empty if it holds all."""
    modules = config.modules
    named = {ALL: "", "outputs": "the output matrices", "attention": "the attention", "mlp": "the MLP"}
    return named[modules] if isinstance(modules, str) else ", ".join(f"`{name}`" for name in modules)


def beside_layers(config: DonorConfig) -> str:
    """Name what a donor holds besides layers, in Markdown; empty if nothing."""
    rows = config.trainable_token_indices or {}
    named = [f"`{name}`" for name in config.modules_to_save or []]
    return ", ".join(named + [f"{len(indices)} rows of `{name}`" for name, indices in rows.items()])


def describe_delta(config: DonorConfig) -> str | None:
    """Describe how a donor is stored as a change of the base's layers; `None` if it is whole."""
    if config.delta is None:
        return None
    how = f"rank {config.delta.get('rank')}" if config.delta.get("kind") == "low_rank" else "in bfloat16"
    lost = config.delta.get("lost")
    left_out = f"; {lost:.2%} of the change is left out" if isinstance(lost, float) else ""
    return f"as a change of the base's layers, {how}{left_out}"


def hub_datasets(config: DonorConfig) -> list[str]:
    """List the training datasets that are on the Hub."""
    return [name for name in config.datasets or [] if hub_id(name) and not name.endswith(_DATA_FILES)]


def _head(config: DonorConfig) -> str | None:
    """Return the head of the model that a donor was trained in, as Auto classes call it, if it holds one."""
    names = {
        name.rpartition(".")[2] for name in (*(config.modules_to_save or ()), *(config.trainable_token_indices or ()))
    }
    if "qa_outputs" in names:
        return "QuestionAnswering"
    return "SequenceClassification" if config.labels and names & {"score", "classifier"} else None


def _measured(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Collect the numbers in nested `metrics`: by name, their values "before" and "after" the transplant."""
    found: dict[str, dict[str, float]] = {}
    for path, value in _numbers(metrics):
        found.setdefault(_name(path), {})["before" if "before" in path else "after"] = value
    return found


def _measured_elsewhere(config: DonorConfig) -> dict[str, Any] | None:
    """Return the place and scale that the numbers were measured at, if they are not the organ's."""
    at: Any = (config.metrics or {}).get(MEASURED_AT)
    return at if isinstance(at, dict) and at != place_of(config) else None


def _privacy(metrics: dict[str, Any]) -> list[str]:
    """Return what a privacy probe found, a sentence each."""
    found: Any = metrics.get(PRIVACY)
    return found if is_of(found, list[str]) else []


def _conditions(metrics: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield the name of each number that says what it was `measured_on`, and that in words."""
    for key, value in metrics.items():
        if not isinstance(value, dict):
            continue
        if key != MEASURED_ON:
            yield from _conditions(value, (*path, str(key)))
            continue
        count, window = (
            number if type(number) is int else None for number in map(value.get, ("num_tokens", "window"))
        )
        tokens = "" if count is None else f"{count:,} tokens of "
        windows = "" if window is None else f", {window:,} tokens at a time"
        text = f"{tokens}{value.get('text') or 'a text without a name'}{windows}"
        yield _name(path), text + _intervals(metrics.get(INTERVAL))


def _intervals(ends: Any) -> str:
    """Put the intervals of a number, if its metrics have them, into words."""
    if not isinstance(ends, dict):
        return ""
    words = [
        f"{'–'.join(f'{end:.4g}' for end in ends[when])} {when}"
        for when in ("before", "after")
        if isinstance(ends.get(when), list | tuple) and len(ends[when]) == 2 and is_of([*ends[when]], list[float])
    ]
    return f"; 95 % interval {', '.join(words)}" if words else ""


def _name(path: tuple[str, ...]) -> str:
    return " ".join(key for key in path if key not in ("before", "after")).replace("_", " ") or "value"


def _numbers(metrics: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, str(key))) if key not in (MEASURED_ON, MEASURED_AT) else ()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, str(key)), float(value)


def _eval_result(name: str, value: float, task: str, domain: str | None) -> EvalResult:
    words = name.split()
    kind = next((kind for kind in KINDS if set(kind.split("_")) <= set(words)), "")
    text = " ".join(word for word in words if word not in kind.split("_")) if kind else ""  # the evaluation text
    return EvalResult(
        task_type=task,
        dataset_type=text.replace(" ", "-") or "evaluation",  # a model-index groups results by it
        dataset_name=(text == "domain" and domain) or text or "evaluation",
        metric_type=kind or "_".join(words),
        metric_name=name,
        metric_value=value,
    )


def picture(config: DonorConfig) -> str | None:
    """Draw the stack of the base with the organ in it."""
    if config.layers is None or config.position is None:
        return None
    (i, j), first = config.layers, config.position
    after = first + (j - i if config.mode == "replace" else 0)
    num_layers = config.native_config("base_config").num_hidden_layers
    if after > num_layers:  # the recipient has more layers than the base
        return None
    organ = f"ORGAN: layers {_span(i, j)} of the base"
    if config.mode == "replace":
        organ += f", instead of {_span(first, after)}"
    own = [
        f"recipient layers {_span(*span)}" if span[0] < span[1] else "" for span in ((0, first), (after, num_layers))
    ]
    rows = [row for row in (own[0], organ, own[1]) if row]
    width = max(map(len, rows))
    border = "─" * (width + 2)
    boxes = f"\n├{border}┤\n".join(f"│ {row:<{width}} │" for row in rows)
    return f"  embeddings\n┌{border}┐\n{boxes}\n└{border}┘\n  final norm, head"


def _span(first: int, last: int) -> str:
    return str(first) if last - first == 1 else f"{first} … {last - 1}"
