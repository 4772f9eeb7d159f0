"""What `not-hf train` does with trained organs: save them, and measure them for their config and card."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from not_hf.cli.app import CHECKPOINTS
from not_hf.cli.eval import measure, window_of
from not_hf.cli.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from not_hf.training.examples import TrainingData


def save_trained(model: Any, folder: Path, data: list[str], domain: str | None) -> None:
    """Save organs in the dtypes of their donors, whatever dtype they were trained in, and record the text."""
    from not_hf.cards.donor import CURVE
    from not_hf.training.record import trained_organs

    for config in trained_organs(model).values():
        config.domain = domain or config.domain
        config.datasets = list(dict.fromkeys([*(config.datasets or []), *map(_public_name, data)]))
        config.metrics = None  # those of an earlier training no longer hold
    if (curve := folder / CHECKPOINTS / CURVE).exists():
        shutil.copy(curve, folder)  # now, for the card
    for organ in model._surgery.organs.values():
        for parameter in organ.parameters():
            if parameter.requires_grad and organ.config.dtype is not None:
                parameter.data = parameter.data.to(organ.config.dtype)
    model.save_pretrained(folder)


def measure_trained(
    folder: Path,
    base: str | None,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, tuple[str, TrainingData]],
    length: int,
) -> None:
    """Measure perplexity of what was saved, as it will be loaded by others, and write it into its config and card.

    Args:
        folder: Of the donor.
        base: The recipient, if not the donor's base.
        tokenizer: That of the training.
        texts: Source and rows of each text, by what it is: `"held-out"` or `"control"`.
        length: Tokens of a conversation that are measured, at most.
    """
    from not_hf import DonorConfig, DonorModel
    from not_hf.cards.common import README
    from not_hf.cards.donor import updated_card
    from not_hf.cards.metrics import organ_metrics
    from not_hf.composition.check import survey
    from not_hf.evaluation.chat_perplexity import measure_chat
    from not_hf.hub.headers import size_of

    model, _ = load_model(str(folder), base)
    metrics: dict[str, Any] = {}
    for name, (source, rows) in texts.items():
        if rows.is_chat:
            found, window = measure_chat(model, rows.examples(tokenizer, length)), length
        else:
            found, window = measure(model, tokenizer, rows.rows["text"]), window_of(model)
        on = {"text": _public_name(source), "num_tokens": found["after"]["num_tokens"], "window": window}
        metrics |= organ_metrics(found, on, prefix="" if name == "held-out" else f"{name}_")
    config = DonorConfig.from_pretrained(folder)
    config.metrics = metrics
    if config.donors is None:
        donor = DonorModel.from_pretrained(folder)
        donor.config.metrics = metrics
        donor.save_pretrained(folder)
        return
    _, organs = survey(folder)
    tensors = [tensor for organ in organs for tensor in organ.tensors.values()]
    num_parameters, size = sum(math.prod(each.shape) for each in tensors), sum(map(size_of, tensors))
    card = updated_card(folder, config, num_parameters, size)
    config.save_pretrained(folder)
    card.save(folder / README)


def _public_name(source: str) -> str:
    """Reduce a local path to its last part, which may be published; a Hub ID stays as it is."""
    return os.path.basename(os.path.normpath(source)) if os.path.exists(source) else source
