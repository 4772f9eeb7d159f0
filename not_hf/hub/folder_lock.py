"""A lock on a folder, so that one save at a time writes into it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

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
    logger.warning("%s cannot be locked (%s); let only one program at a time save there", folder, reason)


def _is_at(folder: str | os.PathLike[str], descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False
