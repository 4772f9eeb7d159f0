"""Byte ranges of files on the Hub: one range, checked, and many ranges, gathered into a local file."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm

from not_hf.architecture.upstream import commit_of
from not_hf.errors import one_line, reaching_hub

PARTS = 64  # requests that a download is split into, within the next two bounds
MIN_PART, MAX_PART = 1 << 20, 8 << 20  # bytes: what one worker holds in memory, and what an interruption loses
WORKERS = 4
TRIES = 5
OVERLAP = 64  # bytes of the next part that a request repeats, to detect a server that sends other bytes than it says


class _WrongAnswerError(Exception):
    """A response that is not the range that was asked for."""


@dataclass(eq=False)
class RemoteFile:
    """One file of a repo on the Hub, at one commit."""

    url: str
    headers: Mapping[str, str] = field(repr=False)  # with the token
    commit: str
    size: int  # bytes
    etag: str | None
    _stored_etag: str | None = field(default=None, repr=False)  # given by the host that serves the bytes

    @classmethod
    def find(cls, repo_id: str, path: str, revision: str | None = None, token: str | bool | None = None) -> RemoteFile:
        """Ask the Hub for a file's commit, size and ETag.

        Raises:
            OSError: As in `hf_hub_download`: there is no such repo, revision or file, or no access to it.
        """
        revision = commit_of(revision) or revision
        url = hf_hub_url(repo_id, path, revision=revision)
        with reaching_hub(f"{repo_id}/{path} cannot be read"):
            found = get_hf_file_metadata(url, token=token, library_name="not_hf", retry_on_errors=True)
        if found.size is None or found.commit_hash is None:
            raise OSError(
                f"the Hub does not tell size and commit of {repo_id}/{path}; download it and name its folder"
            )
        # pinned to this commit, even if the branch moves on meanwhile
        url = hf_hub_url(repo_id, path, revision=found.commit_hash)
        # byte ranges of a compressed response would be others
        headers = build_hf_headers(token=token, library_name="not_hf") | {"Accept-Encoding": "identity"}
        return cls(url, headers, found.commit_hash, found.size, found.etag)

    def read(self, start: int, end: int) -> bytearray:
        """Bytes `start … end - 1`; tried several times.

        Raises:
            OSError: The Hub does not serve exactly these bytes, or the file has changed.
        """
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(2 ** (attempt - 1), 8))
            try:
                return self._request(start, end)
            except HfHubHTTPError as error:  # huggingface_hub has tried again already
                reason = f"the server answered {error.response.status_code}"
                break
            except (HTTPError, _WrongAnswerError) as error:  # connection lost, timeout, unreachable
                reason = one_line(error)
        raise OSError(f"bytes {start} to {end} of {self.url} cannot be read: {reason}; try again")

    def _request(self, start: int, end: int) -> bytearray:
        with http_stream_backoff(
            "GET",
            self.url,
            headers={**self.headers, "Range": f"bytes={start}-{end - 1}"},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
            retry_on_exceptions=(),  # it cannot retry while the body is read; `read` does
        ) as response:
            hf_raise_for_status(response)
            self._check(response, start, end)  # before the body, which may be the whole file
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > end - start:
                    break
        if len(body) != end - start:
            raise _WrongAnswerError(f"{len(body)} bytes or more came instead of {end - start}")
        return body

    def _check(self, response: Any, start: int, end: int) -> None:
        """Check by its headers that a response is the range that was asked for, of the file that was found."""
        expected = f"bytes {start}-{end - 1}/{self.size}"
        found = response.headers.get("Content-Range")
        if response.status_code != 206 or found != expected:
            raise _WrongAnswerError(
                f"the server answered {response.status_code}, {found or 'no range'} instead of {expected}"
            )
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise _WrongAnswerError(f"the server sent it as {encoding}")
        linked = [etag for each in (*response.history, response) if (etag := each.headers.get("X-Linked-ETag"))]
        if any(_plain(etag) != self.etag for etag in linked):
            raise _WrongAnswerError("the file has changed (its ETag is another one)")
        stored = _plain(response.headers.get("ETag"))
        self._stored_etag = self._stored_etag or stored
        if stored is not None and stored != self._stored_etag:
            raise _WrongAnswerError("the file has changed between two ranges (its ETag is another one)")


@dataclass(frozen=True)
class Piece:
    """Bytes `start … end - 1` of a file on the Hub, which go to `offset` of a local file."""

    file: RemoteFile
    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class Part:
    """What one request fetches: bytes `start … end - 1` of a file on the Hub, and `overlap` bytes of the next part."""

    file: RemoteFile
    start: int
    end: int
    overlap: int

    @property
    def size(self) -> int:
        """Bytes without the overlap."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """A file name that no other bytes of any file have."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:32]


def gather(pieces: Sequence[Piece], prefix: bytes, target: Path, description: str, fresh: bool = False) -> None:
    """Put pieces of files on the Hub together in a local file, which appears only when it is whole.

    Each part that has arrived is a file in a folder beside the target until then, so that an interrupted call goes on
    where it was. Processes that want the same target wait for each other.

    Args:
        pieces: Which bytes go where.
        prefix: What the file begins with.
        target: The file; its folder must exist.
        description: For the progress bar.
        fresh: Fetch everything again. An existing target stays until the new one is whole.

    Raises:
        OSError: A range cannot be read; the parts that have arrived are kept. Or neighbouring parts contradict each
            other; none is kept.
    """
    with WeakFileLock(target.with_name(f"{target.name}.lock")):
        if target.exists() and not fresh:
            return
        folder = target.with_name(f"{target.name}.partial")
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        draft = folder / "draft"
        draft.write_bytes(prefix)
        if odd := _fill(draft, pieces, description):
            shutil.rmtree(folder)
            raise OSError(f"ranges of {odd.file.url} contradict each other at byte {odd.start}; try again")
        with draft.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(draft, target)
        shutil.rmtree(folder)


def _fill(draft: Path, pieces: Sequence[Piece], description: str) -> Part | None:
    """Write all pieces into a draft, several parts at once; returns the first part that contradicts the one before."""

    def place(part: Part) -> tuple[bytes, bytes]:
        view = memoryview(_obtain(part, draft.with_name(part.name)))
        with draft.open("r+b") as file:
            for start, length, offset in _places(part, pieces):
                file.seek(offset)
                file.write(view[start : start + length])
        return bytes(view[:OVERLAP]), bytes(view[part.size :])

    parts, repeated = list(_parts(pieces)), b""
    total = sum(part.size for part in parts)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="not_hf")
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, name="not_hf.gather") as bar:
        try:
            for part, (head, tail) in zip(parts, pool.map(place, parts), strict=True):
                if not head.startswith(repeated):
                    return part
                repeated = tail
                bar.update(part.size)
        finally:
            pool.shutdown(cancel_futures=True)
    return None


def _obtain(part: Part, file: Path) -> bytes | bytearray:
    """The bytes of a part, its overlap included: from its file, else from the Hub and then into its file.

    The file begins with a checksum of the rest: a killed process leaves a torn file, a crashed machine even a file of
    the right size without the data.
    """
    if file.exists():
        with file.open("rb") as stream:
            checksum, stored = stream.read(_CHECKSUM), stream.read()
        if len(stored) == part.size + part.overlap and checksum == _checksum(stored):
            return stored
    body = part.file.read(part.start, part.end + part.overlap)
    with file.open("wb") as stream:
        stream.writelines((_checksum(body), body))
    return body


def coalesce(ranges: Sequence[tuple[int, int]], spare: int) -> list[tuple[int, int]]:
    """Join ranges to longer ones, over gaps of at most `spare` bytes in all, the narrowest first.

    Args:
        ranges: Half-open, without overlaps.
        spare: Bytes.
    """
    ordered = sorted(ranges)
    gaps = sorted((after[0] - before[1], n) for n, (before, after) in enumerate(itertools.pairwise(ordered), 1))
    joined = set()  # numbers of the ranges that are joined to the one before
    for gap, n in gaps:
        if (spare := spare - gap) < 0:
            break
        joined.add(n)
    runs: list[tuple[int, int]] = []
    for n, (start, end) in enumerate(ordered):
        if n in joined:
            start, _ = runs.pop()
        runs.append((start, end))
    return runs


def _parts(pieces: Sequence[Piece]) -> Iterator[Part]:
    """Split pieces into requests: two at least for each run of bytes, so that each part has one to agree with."""
    files = {piece.file.url: piece.file for piece in pieces}
    size = max(MIN_PART, min(MAX_PART, sum(piece.end - piece.start for piece in pieces) // PARTS))
    for url, file in files.items():
        wanted = [(piece.start, piece.end) for piece in pieces if piece.file.url == url and piece.start < piece.end]
        for start, end in coalesce(wanted, spare=sum(e - s for s, e in wanted) // 100):
            overlap = min(OVERLAP, (end - start) // 256)
            share = math.ceil((end - start) / max(2, math.ceil((end - start) / size)))
            for first in range(start, end, share):
                last = min(first + share, end)
                yield Part(file, first, last, min(overlap, end - last))


def _places(part: Part, pieces: Sequence[Piece]) -> Iterator[tuple[int, int, int]]:
    """Which bytes of a part go where: offset in the part, length, offset in the local file."""
    for piece in pieces:
        start, end = max(piece.start, part.start), min(piece.end, part.end)
        if piece.file.url == part.file.url and start < end:
            yield start - part.start, end - start, piece.offset + start - piece.start


_CHECKSUM = 4  # bytes


def _checksum(body: bytes | bytearray) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM, "little")


def _plain(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None
