"""How far training has moved a model from its base, along the scale of what was trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import Prepared, mean  # noqa: E402 (from the folder above)


def divergences(prepared: Prepared, rows: Any, scales: Sequence[float]) -> dict[str, float]:
    """KL(base, model at a scale) in nats per token, over rows of token ids `(rows, block)`."""
    import torch

    def log_probabilities(scale: float, part: Any) -> Any:
        prepared.set_scale(scale)
        with torch.no_grad():
            return prepared.model(input_ids=part, use_cache=False).logits.log_softmax(-1)  # (rows, block, vocab)

    prepared.model.eval()
    found: dict[str, list[float]] = {f"{scale:g}": [] for scale in scales}
    for part in rows.to(prepared.model.device).split(2):
        before = log_probabilities(0.0, part)
        for scale in scales:
            after = log_probabilities(scale, part)
            found[f"{scale:g}"].append(float((before.exp() * (before - after)).sum(-1).mean()))
    return {scale: mean(values) for scale, values in found.items()}


def curves_of(places: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What was measured at some scales, for each thousandth from 0 to 1: straight lines in between."""
    import numpy as np

    scales, at = sorted(places, key=float), np.linspace(0, 1, 1001)
    return {
        name: np.interp(at, [float(scale) for scale in scales], [places[scale][name] for scale in scales])
        for name in places["0"]
    }
