"""Xet content on disk: xorbs (packed chunks), and for each file the recipe that puts it together from them.

Formats, all integers little-endian (Xet protocol specification, huggingface.co/docs/xet):

- a xorb is a run of chunks, each an 8-byte header (version, 3 bytes packed length, scheme, 3 bytes plain
  length) and the packed bytes; an optional footer begins with `XETBLOB`.
- a shard begins with a 48-byte header. For each file follow, in 48-byte entries: a header (hash, flags,
  number of terms), the terms (xorb hash, flags, plain length, first chunk, end chunk), as many verification
  entries if flag bit 31 is set, and the sha256 of the file if bit 30 is. 32 bytes 0xFF end them.
- a hash is printed as four 64-bit integers in hexadecimal.
"""

import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .store import write_atomically

_ENTRY = 48  # bytes
_HAS_VERIFICATION, _HAS_METADATA = 1 << 31, 1 << 30
_END = b"\xff" * 32
_FOOTER = b"XETBLOB"


@dataclass(frozen=True)
class Term:
    """Chunks `start` up to, not including, `end` of one xorb: `length` bytes of a file once unpacked."""

    xorb: str
    length: int
    start: int
    end: int

    @property
    def chunks(self) -> dict[str, int]:
        """The chunks in the words of the Xet protocol."""
        return {"start": self.start, "end": self.end}


@dataclass(frozen=True)
class Recipe:
    """How one file is put together. `sha256` ties it to the LFS object that a commit names."""

    hash: str
    sha256: str | None
    terms: tuple[Term, ...]


class Xorbs:
    """Xorbs and recipes below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def xorb(self, xorb_hash: str) -> Path:
        """Where a xorb lies, or would."""
        return self._root / "xorbs" / xorb_hash

    def add_xorb(self, xorb_hash: str, content: bytes) -> None:
        """Keep one xorb."""
        write_atomically(self.xorb(xorb_hash), content)

    def add_shard(self, content: bytes) -> None:
        """Keep the recipes a shard holds."""
        for recipe in parse_shard(content):
            write_atomically(self._root / "files" / recipe.hash, json.dumps(asdict(recipe)).encode())
            if recipe.sha256:
                write_atomically(self._root / "sha256" / recipe.sha256, recipe.hash.encode())

    def file_hash(self, sha256: str) -> str | None:
        """Xet's name for the content with that sha256, if it came in by Xet."""
        path = self._root / "sha256" / sha256
        return path.read_text() if path.exists() else None

    def size(self, sha256: str) -> int | None:
        """Size in bytes of the content with that sha256, if it came in by Xet."""
        xet_hash = self.file_hash(sha256)
        return sum(term.length for term in self.terms(xet_hash)) if xet_hash else None

    def terms(self, xet_hash: str) -> list[Term]:
        """The terms of a file in order.

        Raises:
            FileNotFoundError: there is no such file.
        """
        recipe = json.loads((self._root / "files" / xet_hash).read_bytes())
        return [Term(**term) for term in recipe["terms"]]

    def reconstruction(self, xet_hash: str, offset: int, length: int, address: str) -> dict[str, Any]:
        """How to rebuild `length` bytes of a file from `offset`, in the words of the Xet protocol."""
        terms = self.terms(xet_hash)
        ends = list(itertools.accumulate(term.length for term in terms))
        needed = [
            (end - term.length, term)
            for end, term in zip(ends, terms, strict=True)
            if end > offset and end - term.length < offset + length
        ]
        fetch: dict[str, list[dict[str, Any]]] = {}
        for _, term in needed:
            fetch.setdefault(term.xorb, []).append(self._fetch(term, f"{address}/{term.xorb}"))
        return {
            "offset_into_first_range": offset - needed[0][0] if needed else 0,
            "terms": [{"hash": term.xorb, "unpacked_length": term.length, "range": term.chunks} for _, term in needed],
            "fetch_info": fetch,
        }

    def _fetch(self, term: Term, url: str) -> dict[str, Any]:
        offsets = chunk_offsets(self.xorb(term.xorb).read_bytes())
        url_range = {"start": offsets[term.start], "end": offsets[term.end] - 1}  # bytes, both inclusive
        return {"range": term.chunks, "url": url, "url_range": url_range}


def parse_shard(content: bytes) -> Iterator[Recipe]:
    """The recipes of a shard."""
    position = _ENTRY
    while (file_hash := content[position : position + 32]) != _END:
        flags, count = struct.unpack_from("<II", content, position + 32)
        first = position + _ENTRY
        terms = tuple(_parse_term(content, first + _ENTRY * index) for index in range(count))
        position = first + _ENTRY * count * (2 if flags & _HAS_VERIFICATION else 1)
        sha256 = None
        if flags & _HAS_METADATA:
            sha256 = format_hash(content[position : position + 32])
            position += _ENTRY
        yield Recipe(format_hash(file_hash), sha256, terms)


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each chunk of a xorb begins, in bytes, and where the last one ends."""
    offsets = [0]
    while offsets[-1] < len(xorb) and not xorb.startswith(_FOOTER, offsets[-1]):
        start = offsets[-1]
        offsets.append(start + 8 + int.from_bytes(xorb[start + 1 : start + 4], "little"))
    return offsets


def format_hash(raw: bytes) -> str:
    """A hash as the protocol prints it."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _parse_term(content: bytes, position: int) -> Term:
    xorb, _flags, length, start, end = struct.unpack_from("<32sIIII", content, position)
    return Term(format_hash(xorb), length, start, end)
