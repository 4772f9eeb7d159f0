"""The folder of prefix stores: what in it was made by not_hf, and so may be deleted to make room.

A store is a folder that was created with a marker file and holds files of rows besides it. Stores of versions without
markers are recognized by their names and those of their files. Nothing else is deleted, and no link is followed.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from not_hf.errors import NotHFError, some

MARKER = "CACHEDIR.TAG"  # backup programs leave out a folder that holds it
_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder is a store of not_hf's prefix cache (format 1); not_hf deletes it to make room.\n"
)
_STORE = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{32}\.(rows|index)|\.nfs[0-9a-f]+")  # NFS renames what is deleted while it is open


def require_only_stores(folder: Path) -> None:
    """Check that a folder holds stores and nothing else, or does not exist. Nothing is changed.

    Raises:
        NotHFError: It holds something else, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotHFError(f"prefix_dir {folder} is a file; choose a folder")
    foreign = []
    for entry in _entries(folder):
        with contextlib.suppress(FileNotFoundError):  # another process is making room
            if _own_files(entry) is None:
                foreign.append(entry.name)
    if foreign:
        raise NotHFError(
            f"prefix_dir {folder} holds {some(sorted(foreign))}, not made by the prefix cache, which deletes old "
            "stores there to make room; choose an empty or new folder"
        )


def make_store(folder: Path) -> None:
    """Create a store, with its marker, unless it exists; mark it as the most recently used."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.suppress(FileExistsError), open(folder / MARKER, "xb") as file:
            file.write(_TAG)
        os.utime(folder)
    except FileNotFoundError:  # another process has just deleted it
        make_store(folder)


def make_room(folder: Path, max_bytes: int) -> int:
    """Delete sibling stores of `folder`, least recently used first, until all fit; return the bytes that remain."""
    stores = []
    for entry in _entries(folder.parent):
        with contextlib.suppress(OSError):  # another process is making room, or it is not ours to read
            if (files := _own_files(entry)) is not None:
                size = sum(file.stat().st_size for file in files if file.name != MARKER)
                stores.append((entry.stat().st_mtime, entry.path, size, files))
    held = sum(size for _, _, size, _ in stores)
    for _, path, size, files in sorted(stores, key=lambda store: store[:2]):
        if held <= max_bytes:
            break
        if os.path.basename(path) != folder.name:
            _delete(path, files)
            held -= 0 if os.path.exists(path) else size
    return held


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder; a missing one is empty."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []


def _own_files(entry: os.DirEntry[str]) -> list[os.DirEntry[str]] | None:
    """List the files of a store; `None` for anything that cannot be proven to be one.

    Raises:
        FileNotFoundError: It is being deleted.
    """
    if not entry.is_dir(follow_symlinks=False):
        return None
    with os.scandir(entry.path) as found:
        files = list(found)
    if not all(
        each.is_file(follow_symlinks=False) and (each.name == MARKER or _FILE.fullmatch(each.name)) for each in files
    ):
        return None
    tag = b"".join(Path(each.path).read_bytes() for each in files if each.name == MARKER)
    is_unmarked = _STORE.fullmatch(entry.name) and _TAG.startswith(tag)  # or the marker is being written
    return files if tag == _TAG or is_unmarked else None


def _delete(path: str, files: list[os.DirEntry[str]]) -> None:
    """Delete these files of a store, the marker last, and its folder if nothing else has come into it."""
    for file in sorted(files, key=lambda file: file.name == MARKER):
        with contextlib.suppress(OSError):
            os.unlink(file.path)
    with contextlib.suppress(OSError):
        os.rmdir(path)
