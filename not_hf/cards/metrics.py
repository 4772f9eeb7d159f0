"""What was measured of an organ, as its `metrics` hold it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from not_hf.config import DonorConfig

MEASURED_ON = "measured_on"  # key beside a number: the text that it was measured on, its tokens and the window
MEASURED_AT = "measured_at"  # key in the metrics: the place and scale of the organ then, if it was moved since
INTERVAL = "confidence_interval"  # key beside a number: the ends of its 95 % interval, by "before" and "after"
PRIVACY = "privacy"  # key in the metrics, of sentences: what a probe found
KINDS = ("perplexity", "bits_per_byte")  # of numbers; nats per token would say what perplexity says


def place_of(config: DonorConfig) -> dict[str, Any]:
    """Return the place and scale of an organ, as `metrics` note them."""
    return {"position": config.position, "mode": config.mode, "scale": config.scale}


def metrics_after_move(config: DonorConfig, before: DonorConfig) -> dict[str, Any] | None:
    """Return an organ's `metrics`, with a note of where it was measured if it has another place or scale than before.

    Numbers that were written since are taken for those of its place.
    """
    metrics = config.metrics
    if not metrics or metrics != before.metrics or MEASURED_AT in metrics or place_of(config) == place_of(before):
        return metrics
    return {**metrics, MEASURED_AT: place_of(before)}


def drop_measured_before(config: DonorConfig, before: DonorConfig) -> bool:
    """Drop what was measured of an organ before it learned; its best position keeps its place, without perplexities.

    What was written since is kept.

    Args:
        config: The organ's, which is changed.
        before: The one that it was loaded with.

    Returns:
        Whether there were `metrics` to drop.
    """
    has_old = bool(config.metrics) and config.metrics == before.metrics
    if has_old:
        config.metrics = None
    if config.best_position and config.best_position == before.best_position:
        config.best_position = {key: config.best_position[key] for key in ("position", "mode")}
    return has_old


def organ_metrics(
    found: Mapping[str, Mapping[str, Any]], measured_on: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Return results of `perplexity` as `metrics`.

    Args:
        found: Those `"after"` the transplant and `"before"` it.
        measured_on: The text, its tokens and the window.
        prefix: Of the numbers' names.
    """
    metrics = {}
    for kind in KINDS:
        results = {when: found[when] for when in ("before", "after") if kind in found.get(when, ())}
        numbers = {when: each[kind] for when, each in results.items()}
        ends = {when: each.get(INTERVAL, {}).get(kind) for when, each in results.items()}
        intervals = {when: list(each) for when, each in ends.items() if each}
        if numbers:
            beside: dict[str, Any] = {INTERVAL: intervals} if intervals else {}
            metrics[prefix + kind] = numbers | beside | {MEASURED_ON: dict(measured_on)}
    return metrics


def perplexities(logs: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and perplexity of each evaluation set in a trainer's log; an only set (`eval_loss`) has no name.

    Losses beside rewards are those of preferences (TRL's `DPOTrainer`), which are not of tokens.
    """
    if any("rewards/" in key for key in logs):
        return
    for key, loss in logs.items():
        if match := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
            yield match[1] or "", math.exp(loss) if loss < 700 else math.inf  # above, exp overflows


def trainer_metrics(found: Mapping[str, float]) -> dict[str, Any] | None:
    """Return perplexities, by the name of their evaluation set, as `metrics`; `None` if there are none."""
    text = "the evaluation set of its training, in the trainer's batches"
    metrics = {
        f"{name}_perplexity" if name else "perplexity": {"after": value, MEASURED_ON: {"text": text}}
        for name, value in found.items()
    }
    return metrics or None
