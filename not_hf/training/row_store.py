"""Tensors on disk, stored and read by key.

A store is a folder of segments. One process writes a segment, by appending only: `<name>.rows` holds the bytes, and
`<name>.index` one record for each row, written after its bytes. So a process may be killed at any moment, and several
may share the folder: an incomplete row has no record or does not match its checksum, and counts as missing. Rows are
read rather than mapped, since a map of a file that another program truncates kills the process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
import uuid
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from not_hf.training.prefix_folder import make_room, make_store

logger = logging.getLogger(__name__)

_RECORD = struct.Struct("<32sQQI")  # key, offset of the row in its file, its size in bytes, its checksum


class _Location(NamedTuple):
    file: BinaryIO
    start: int
    size: int
    checksum: int


class RowStore:
    """Tensors by key, in a folder of limited size.

    Args:
        folder: Created when missing.
        max_bytes: Limit for this store and those in sibling folders together. The least recently used siblings are
            deleted first. When none is left, no more rows are added: under cyclic access that gives the most hits.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.hits = self.misses = 0
        make_store(folder)
        self._locations: dict[bytes, _Location] = {}
        for index in sorted(folder.glob("*.index")):
            with contextlib.suppress(FileNotFoundError):  # a process was killed before it wrote both, or makes room
                self._open(index)
        self._room = max_bytes - make_room(folder, max_bytes)
        self._segment: tuple[BinaryIO, BinaryIO] | None = None

    def __contains__(self, key: bytes) -> bool:
        return key in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def read(self, key: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return the tensor of a key; `None` when there is none or it is damaged."""
        location = self._locations.get(key)
        row = torch.empty(shape, dtype=dtype)
        if location is not None and location.size == row.nbytes:
            data = _read_at(location.file, location.start, location.size)
            if len(data) == location.size and zlib.crc32(data) == location.checksum:
                _bytes_of(row)[:] = data
                self.hits += 1
                return row
        self._locations.pop(key, None)
        self.misses += 1
        return None

    def write(self, key: bytes, row: torch.Tensor) -> None:
        """Store a tensor if there is room; otherwise do nothing."""
        data = _bytes_of(row.detach().cpu().contiguous())
        if key in self._locations or len(data) > self._room:
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
            logger.warning("no more rows are stored in %s: %s", self.folder, error)
            self._room = 0
            return
        self._room -= len(data)
        self._locations[key] = _Location(rows, start, len(data), checksum)

    def _new_segment(self) -> tuple[BinaryIO, BinaryIO]:
        make_store(self.folder)  # another process may have deleted it to make room
        name = self.folder / uuid.uuid4().hex
        return open(name.with_suffix(".rows"), "a+b"), open(name.with_suffix(".index"), "ab")

    def _open(self, index: Path) -> None:
        """Find the rows of a segment; anything but a regular file is left alone."""
        name = index.with_suffix(".rows")
        if not all(stat.S_ISREG(file.lstat().st_mode) for file in (index, name)):
            return
        rows = open(name, "rb")  # noqa: SIM115 (kept open for reading)
        end, records = os.fstat(rows.fileno()).st_size, index.read_bytes()
        for key, start, size, checksum in _RECORD.iter_unpack(records[: len(records) // _RECORD.size * _RECORD.size]):
            if start + size <= end:
                self._locations[key] = _Location(rows, start, size, checksum)


def _bytes_of(row: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, which may be none, to read and write."""
    return row.view(-1).view(torch.uint8).numpy().data


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    """Read a part of a file, without its position, which forked processes share; Windows has neither."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, start)
    file.seek(start)
    return file.read(size)
