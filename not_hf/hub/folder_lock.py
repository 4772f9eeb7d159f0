"""A lock on a folder, so that one save at a time writes into it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from not_hf.cards.common import warn_once

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    fcntl: Any = None
else:
    fcntl = _fcntl

logger = logging.getLogger(__name__)

_AT_ONCE = 0.05  # seconds to wait for a lock that should be free


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Lock a folder inside the block, against other threads, processes and, where the file system can, machines.

    The lock is on the folder itself: it leaves no file behind, and ends with the process. Windows cannot lock folders:
    there it is on a file in the folder for temporary files, against threads and processes of the same user.

    Args:
        folder: Created if missing.

    Yields:
        Whether it is locked. Some network file systems cannot; a warning says so.
    """
    if fcntl is None:
        with _locked_by_file(folder):
            os.makedirs(folder, exist_ok=True)
            yield True
        return
    descriptor, is_locked = None, False
    try:
        while descriptor is None:
            os.makedirs(folder, exist_ok=True)
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
    try:
        if fcntl is None:
            with WeakFileLock(_lock_file(folder), timeout=_AT_ONCE):
                return False
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        return isinstance(error, TimeoutError)
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
        logger.warning(_WAITING, folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        warn_once(f"{folder} cannot be locked ({error}); let only one program at a time save there")
        return False
    return True


_WAITING = "another save into %s is under way; waiting for it"


@contextlib.contextmanager
def _locked_by_file(folder: str | os.PathLike[str]) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(_lock_file(folder), timeout=_AT_ONCE))
        except TimeoutError:
            logger.warning(_WAITING, folder)
            held.enter_context(WeakFileLock(_lock_file(folder)))
        yield


def _lock_file(folder: str | os.PathLike[str]) -> Path:
    """The file that is locked in place of a folder."""
    name = hashlib.sha256(os.path.normcase(os.path.realpath(folder)).encode()).hexdigest()[:32]
    file = Path(tempfile.gettempdir(), "not_hf-locks", f"{name}.lock")
    file.parent.mkdir(exist_ok=True)
    return file


def _is_at(folder: str | os.PathLike[str], descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False
