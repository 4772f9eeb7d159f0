"""A lock on a folder, so that one save at a time writes into it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

from not_hf.cards.common import warn_once

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    fcntl: Any = None
else:
    fcntl = _fcntl

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Lock a folder inside the block, against other threads, processes and, where the file system can, machines.

    The lock is on the folder itself: it leaves no file behind, and ends with the process.

    Args:
        folder: Created if missing.

    Yields:
        Whether it is locked. Windows and some network file systems cannot; a warning says so.
    """
    descriptor, is_locked = None, False
    try:
        while descriptor is None:
            os.makedirs(folder, exist_ok=True)
            if fcntl is None:
                _warn(folder, "not on this system")
                break
            descriptor = os.open(folder, os.O_RDONLY)
            is_locked = _lock(descriptor, folder)
            if is_locked and not _is_at(folder, descriptor):  # a save that failed has removed it
                os.close(descriptor)
                descriptor = None
        yield is_locked
    finally:
        if descriptor is not None:
            if is_locked:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile would keep it
            os.close(descriptor)


def may_be_locked(folder: str | os.PathLike[str]) -> bool:
    """Whether somebody holds the lock of a folder; `True` where locks do not work."""
    if fcntl is None:
        return True
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock(descriptor: int, folder: str | os.PathLike[str]) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("another save into %s is under way; waiting for it", folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        _warn(folder, str(error))
        return False
    return True


def _warn(folder: str | os.PathLike[str], reason: str) -> None:
    warn_once(f"{folder} cannot be locked ({reason}); let only one program at a time save there")


def _is_at(folder: str | os.PathLike[str], descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False
