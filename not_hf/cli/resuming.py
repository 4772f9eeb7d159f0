"""How `not-hf train` goes on with an interrupted training, with the options that it was started with."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from not_hf.cli.app import CHECKPOINTS
from not_hf.errors import NotHFError

OPTIONS = "options.json"  # file beside the checkpoints


def save_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a new training beside its checkpoints."""
    (folder / OPTIONS).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def require_same_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Check that a training is resumed as it was started; two paths to one file are the same value.

    Args:
        folder: Of the checkpoints.
        options: Those that decide what is learned, as for `save_options`.

    Raises:
        NotHFError: An option has another value.
    """
    if not (folder / OPTIONS).exists():
        return
    saved = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    if others := [
        f"--{key.replace('_', '-')} was {_shown(saved[key])} and is {_shown(now)}"
        for key, now in options.items()
        if key in saved and os.path.realpath(str(saved[key])) != os.path.realpath(str(now))
    ]:
        raise NotHFError(
            f"the training in {folder} was started with other options: {', '.join(others)}; resume it with the same "
            "ones, or start over with --force instead of --resume"
        )


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)


def last_checkpoint(folder: Path) -> str:
    """Find the last checkpoint to resume from.

    Raises:
        NotHFError: There is none.
    """
    from not_hf.training.checkpoints import last_complete_checkpoint

    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise NotHFError(f"no checkpoint in {folder} to resume from; leave out --resume")
    return checkpoint


def how_to_resume(output: Path) -> list[str]:
    """Say after Ctrl-C what was saved, and the command that continues from there."""
    from not_hf.training.checkpoints import last_complete_checkpoint

    checkpoint = last_complete_checkpoint(output / CHECKPOINTS)
    if checkpoint is None:
        return ["interrupted before the first checkpoint (--save-steps); nothing was saved"]
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--force", "--resume")]
    return [
        f"interrupted; the training is saved in {checkpoint}. To continue it:",
        shlex.join(["not-hf", *arguments, "--resume"]),
    ]
