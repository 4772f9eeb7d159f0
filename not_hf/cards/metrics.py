"""What a trainer measured, as an organ's `metrics` hold it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

MEASURED_ON = "measured_on"  # key beside a number: the text that it was measured on, its tokens and the window


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
