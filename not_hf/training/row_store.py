"""Rows of tensors on disk, found again by what they were computed from.

A folder of segments, each written by one process, by appending only: `<name>.rows` holds the bytes, `<name>.index` one
record for each row, written after them. So a process may be killed at any moment, and several may share the folder:
what is not whole is not in an index, or does not match its checksum, and is computed again. Rows are read into memory
with `preadv` rather than mapped, since a map of a file that another program cuts short kills the process.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

logger = logging.getLogger(__name__)

_RECORD = struct.Struct("<32sQQI")  # key, where the row begins, its bytes, their checksum


class _Place(NamedTuple):
    file: BinaryIO
    start: int
    size: int
    checksum: int


class RowStore:
    """Tensors by key, in a folder, up to a size.

    Args:
        folder: Created when missing. Its siblings count towards the size too.
        max_bytes: Of all stores beside each other. Those that were not used for longest go first; when there are no
            others, nothing more is added. Under cyclic access that keeps most.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.hits = self.misses = 0
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # used now
        self._places: dict[bytes, _Place] = {}
        for index in sorted(folder.glob("*.index")):
            self._open(index)
        self._room = max_bytes - _make_room(folder, max_bytes)
        self._segment: tuple[BinaryIO, BinaryIO] | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """The tensor of that key, or `None` when there is none, or it is damaged."""
        place = self._places.get(key)
        row = torch.empty(shape, dtype=dtype)
        if place is not None and place.size == row.nbytes:
            into = row.view(torch.uint8).numpy().data.cast("B")
            whole = os.preadv(place.file.fileno(), [into], place.start) == place.size
            if whole and zlib.crc32(into) == place.checksum:
                self.hits += 1
                return row
        self._places.pop(key, None)
        self.misses += 1
        return None

    def write(self, key: bytes, row: torch.Tensor) -> None:
        """Keep a tensor, if there is room. It is not an error if there is none."""
        data = row.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        if key in self._places or len(data) > self._room:
            return
        try:
            rows, index = self._segment = self._segment or self._new_segment()
            start = rows.seek(0, os.SEEK_END)
            rows.write(data)
            rows.flush()
            checksum = zlib.crc32(data)
            index.write(_RECORD.pack(key, start, len(data), checksum))
            index.flush()
        except OSError as error:  # the disk is full
            logger.warning("the cache in %s takes no more: %s", self.folder, error)
            self._room = 0
            return
        self._room -= len(data)
        self._places[key] = _Place(rows, start, len(data), checksum)

    def _new_segment(self) -> tuple[BinaryIO, BinaryIO]:
        name = self.folder / uuid.uuid4().hex
        return open(name.with_suffix(".rows"), "a+b"), open(name.with_suffix(".index"), "ab")

    def _open(self, index: Path) -> None:
        try:
            rows = open(index.with_suffix(".rows"), "rb")  # noqa: SIM115 (it stays open, to read from)
        except FileNotFoundError:
            return
        end, records = os.fstat(rows.fileno()).st_size, index.read_bytes()
        for key, start, size, checksum in _RECORD.iter_unpack(records[: len(records) // _RECORD.size * _RECORD.size]):
            if start + size <= end:
                self._places[key] = _Place(rows, start, size, checksum)


def _make_room(folder: Path, max_bytes: int) -> int:
    """Remove stores beside `folder`, those unused for longest first, until all fit. Returns the bytes that remain."""

    def size(store: Path) -> int:
        return sum(file.stat().st_size for file in store.iterdir() if file.is_file())

    stores = sorted((each for each in folder.parent.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
    sizes = {store: size(store) for store in stores}
    for store in stores:
        if sum(sizes.values()) <= max_bytes:
            break
        if store != folder:
            shutil.rmtree(store, ignore_errors=True)
            del sizes[store]
    return sum(sizes.values())
