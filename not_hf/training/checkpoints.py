"""Checkpoints of a trainer: which are whole, and which can be restored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from not_hf.errors import NotHFError
from not_hf.recipient.mixin import Recipient


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Find the newest checkpoint of a `Trainer` that was written completely; `None` when there is none.

    `Trainer` writes `trainer_state.json` last.
    """

    def is_complete(checkpoint: Path) -> bool:
        try:
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        except (OSError, json.JSONDecodeError):
            return False
        return True

    found = [each for each in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if each.name.split("-")[-1].isdigit()]
    found.sort(key=lambda each: int(each.name.split("-")[-1]), reverse=True)
    return next((str(each) for each in found if is_complete(each)), None)


def require_restorable(model: Any) -> None:
    """Check that a trainer can load a checkpoint into a model.

    Raises:
        NotHFError: The model has several organs; their checkpoint is a composition, without weights of its own.
    """
    if isinstance(model, Recipient) and len(model.donor_config) > 1:
        raise NotHFError(
            f"a trainer cannot restore a checkpoint of several organs ({', '.join(model.donor_config)}); leave out "
            "load_best_model_at_end and resume_from_checkpoint, and load the checkpoint that you want with "
            "TransplantedForCausalLM.from_pretrained(folder)"
        )
