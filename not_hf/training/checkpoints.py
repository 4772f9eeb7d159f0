"""Checkpoints of a trainer: which are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


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
