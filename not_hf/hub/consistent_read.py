"""Reading a folder to which somebody may save: what is read is of one save, or refused.

A save removes `config.json` first and writes it last, so the weights beside a config are its own. A reader that finds
the digests of its config still there after it has opened the weights has opened the weights of that config.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils import CONFIG_NAME

from not_hf.errors import CorruptDonorError, NotHFError
from not_hf.hub.atomic_write import DRAFT
from not_hf.hub.folder_lock import may_be_locked

# Seconds between the tries of a reader; files are moved within milliseconds
_PAUSES = (0.01, 0.05, 0.1, 0.2, 0.5, 1)

Found = TypeVar("Found")


def read_steadily(source: Any, read: Callable[[], Found]) -> Found:
    """Call `read`, again if it fails because somebody saves to the folder `source` meanwhile.

    Raises:
        NotHFError: As `read`.
        OSError: As `read`.
    """
    for pause in _PAUSES:
        before = _state(source)
        try:
            return read()
        except (NotHFError, OSError):
            if before is None or (_state(source) == before and not before[0]):
                raise
        time.sleep(pause)
    return read()


def saved_digests(source: str | os.PathLike[str], subfolder: str | None = None) -> dict[str, str] | None:
    """The digests in the `config.json` of a folder as it is now; `None` if there are none, or on the Hub."""
    try:
        values = json.loads(Path(source, subfolder or "", CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = values.get("digests") if isinstance(values, dict) else None
    return {str(file): str(value) for file, value in found.items()} if isinstance(found, dict) and found else None


def require_same_save(source: str | os.PathLike[str], subfolder: str | None, digests: dict[str, str] | None) -> None:
    """Check that a folder still holds the save whose config was read. On the Hub, a commit does not change.

    Raises:
        CorruptDonorError: It was saved again.
    """
    if os.path.isdir(source) and saved_digests(source, subfolder) != digests:
        raise CorruptDonorError(f"{Path(source, subfolder or '')} was saved again while it was read; load it again")


def _state(source: Any) -> tuple[bool, tuple[int, ...] | None] | None:
    """Whether a save into a folder is under way, and what changes with its config; `None` if it is no folder."""
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return None
    is_saving = any(Path(source).glob(f"{DRAFT}*")) and may_be_locked(source)  # a killed save leaves its draft
    try:
        found = os.stat(Path(source, CONFIG_NAME))
    except OSError:
        return is_saving, None
    return is_saving, (found.st_ino, found.st_size, found.st_mtime_ns)
