"""Checkpoints of a trainer: which are whole, and whose organs they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from not_hf.config import DonorConfig
from not_hf.errors import NotHFError, interval
from not_hf.recipient.mixin import Recipient

ALONE = ""  # for the name of the only organ of a checkpoint


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


def saved_organs(checkpoint: str | os.PathLike[str]) -> dict[str, DonorConfig]:
    """Read the configs of the organs in a checkpoint by name, which an organ `ALONE` does not have.

    There are none if the checkpoint is of adapters or of sharded weights.
    """
    if not os.path.isfile(os.path.join(checkpoint, CONFIG_NAME)):
        return {}
    root = DonorConfig.from_pretrained(checkpoint)
    if root.donors is None:
        return {ALONE: root}
    return {each["name"]: DonorConfig.from_pretrained(checkpoint, subfolder=each["name"]) for each in root.donors}


def require_same_organs(model: PreTrainedModel, checkpoint: str | os.PathLike[str]) -> None:
    """Check that a checkpoint holds the organs of a model, as far as configs tell; others may have the same shapes.

    Raises:
        NotHFError: It holds others: of other layers, at another place, or for another recipient.
    """
    if not isinstance(model, Recipient) or not (saved := saved_organs(checkpoint)):
        return
    ours = model.donor_config
    if len(ours) != len(saved) or (ALONE not in saved and saved.keys() != ours.keys()):
        raise NotHFError(
            f"{checkpoint} is of {'one organ' if ALONE in saved else f'organs {[*saved]}'}, and the model has "
            f"{[*ours]}; resume with the same donors, or start a new training"
        )
    for name, config in ours.items():
        theirs = saved[ALONE if ALONE in saved else name]
        if differences := _differences(theirs, config, model.base_config.name_or_path):
            raise NotHFError(
                f"{checkpoint} is of another organ than {name!r}: {', '.join(differences)}; resume with the donor "
                "that it was made with, or start a new training"
            )


def _differences(saved: DonorConfig, ours: DonorConfig, base: str | None) -> list[str]:
    """List what tells a saved organ from a loaded one; `base` is the recipient's name, if it has one."""
    pairs = {
        "layers": (interval(saved.span), interval(ours.span)),
        **{key: (getattr(saved, key), getattr(ours, key)) for key in ("position", "mode", "modules")},
    }
    found = [f"{key} {first}, not {second}" for key, (first, second) in pairs.items() if first != second]
    first, second = saved.base_model_name_or_path or "", base or ours.base_model_name_or_path or ""
    if not (first and second) or os.path.isdir(first) != os.path.isdir(second):  # one may be a copy of the other
        return found
    return found if os.path.realpath(first) == os.path.realpath(second) else [*found, f"base {first}, not {second}"]
