"""Byte ranges of files on the Hub: one range, read strictly, and many ranges, gathered into a local file."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm

from not_hf.architecture.upstream import commit_of
from not_hf.errors import one_line, reaching_hub

PARTS = 64  # into which what is wanted is cut, within the next two bounds
MIN_PART, MAX_PART = 1 << 20, 8 << 20  # bytes: what one worker holds, and what is lost when a download breaks off
WORKERS = 4
TRIES = 5
OVERLAP = 64  # bytes that a part repeats of the next one, to notice a server that sends other bytes than it says


@dataclass(eq=False)
class RemoteFile:
    """One file of a repo on the Hub, at one commit."""

    url: str
    headers: Mapping[str, str] = field(repr=False)  # with the token
    commit: str
    size: int  # bytes
    etag: str | None
    _stored_etag: str | None = field(default=None, repr=False)  # of the host that serves the bytes

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
                f"the Hub does not tell size and commit of {path} in {repo_id}; download the repo and cut it"
            )
        # of this very commit, even if the branch moves on meanwhile
        url = hf_hub_url(repo_id, path, revision=found.commit_hash)
        # a compressed answer would have other ranges
        headers = build_hf_headers(token=token, library_name="not_hf") | {"Accept-Encoding": "identity"}
        return cls(url, headers, found.commit_hash, found.size, found.etag)

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start … end - 1`, exactly those, tried several times.

        Raises:
            OSError: The Hub does not serve them, or serves a file that has changed.
        """
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(2 ** (attempt - 1), 8))
            try:
                with http_stream_backoff(
                    "GET",
                    self.url,
                    headers={**self.headers, "Range": f"bytes={start}-{end - 1}"},
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    follow_redirects=True,
                    retry_on_exceptions=(),  # of the body too; those it cannot take, so all are caught here
                ) as response:
                    hf_raise_for_status(response)
                    if objection := self._objection(response, start, end):
                        reason = objection
                        continue  # without reading a body that may be the whole file
                    body = bytearray()
                    for chunk in response.iter_raw():
                        body += chunk
                        if len(body) > end - start:
                            break
                if len(body) == end - start:
                    return bytes(body)
                reason = f"{len(body)} bytes or more came instead of {end - start}"
            except HfHubHTTPError as error:  # after tries of its own
                reason = f"the server answered {error.response.status_code}"
                break
            except HTTPError as error:  # hung up midway, too slow, unreachable
                reason = one_line(error)
        raise OSError(f"bytes {start} to {end} of {self.url} cannot be read: {reason}; try again")

    def _objection(self, response: Any, start: int, end: int) -> str | None:
        """Why an answer is not the range that was asked for."""
        expected = f"bytes {start}-{end - 1}/{self.size}"
        found = response.headers.get("Content-Range")
        if response.status_code != 206 or found != expected:
            return f"the server answered {response.status_code}, {found or 'no range'} instead of {expected}"
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            return f"the server sent it as {encoding}"
        linked = [etag for each in (*response.history, response) if (etag := each.headers.get("X-Linked-ETag"))]
        if any(_plain(etag) != self.etag for etag in linked):
            return "the file has changed (its ETag is another one)"
        stored = _plain(response.headers.get("ETag"))
        self._stored_etag = self._stored_etag or stored
        if stored is not None and stored != self._stored_etag:
            return "the file has changed between two ranges (its ETag is another one)"
        return None


@dataclass(frozen=True)
class Piece:
    """Bytes `start … end - 1` of a file on the Hub that go to `offset` of a local one."""

    file: RemoteFile
    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class Part:
    """What is fetched in one request: `start … end - 1`, and `overlap` bytes more."""

    file: RemoteFile
    start: int
    end: int
    overlap: int


def gather(pieces: Sequence[Piece], prefix: bytes, target: Path, description: str, fresh: bool = False) -> None:
    """Put pieces of files on the Hub together in a local file, which appears only when it is whole.

    What was fetched before an interruption is not fetched again. Processes that want the same file wait for each
    other.

    Args:
        pieces: Which bytes go where.
        prefix: What the file begins with.
        target: The file; the folder must be there.
        description: For the progress bar.
        fresh: Fetch all of it, whatever is there; the file that is there stays until then.

    Raises:
        OSError: A range cannot be read; what was fetched is kept for the next try.
    """
    with WeakFileLock(target.with_name(f"{target.name}.lock")):
        if target.exists() and not fresh:
            return
        draft, journal = (target.with_name(f"{target.name}.{ending}") for ending in ("incomplete", "parts"))
        parts = list(_parts(pieces))
        places = {part: list(_places(part, pieces)) for part in parts}
        digest = hashlib.sha256(repr((prefix, parts)).encode()).hexdigest()
        done = {} if fresh else _read_journal(journal, digest, draft, [places[part] for part in parts])
        if not done:
            journal.unlink(missing_ok=True)
            draft.write_bytes(prefix)
            journal.write_text(json.dumps(digest) + "\n")

        def fetch(number: int) -> int:
            part = parts[number]
            body = part.file.read(part.start, part.end + part.overlap)
            _write(draft, places[part], body)
            own = part.end - part.start
            done[number] = _Done(_checksum(draft, places[part]), body[:OVERLAP].hex(), body[own:].hex())
            with journal.open("a") as file:  # one short line in one write
                file.write(json.dumps([number, *done[number]]) + "\n")
            return own

        sizes = [part.end - part.start for part in parts]
        missing = [number for number in range(len(parts)) if number not in done]
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="not_hf")
        with tqdm(
            total=sum(sizes),
            initial=sum(sizes[number] for number in done),
            unit="B",
            unit_scale=True,
            desc=description,
            name="not_hf.gather",
        ) as bar:
            try:
                for size in pool.map(fetch, missing):
                    bar.update(size)
            finally:
                pool.shutdown(cancel_futures=True)
        if odd := _torn(parts, done):
            draft.unlink()
            raise OSError(f"neighbouring ranges of {odd.file.url} contradict each other at byte {odd.end}; try again")
        with draft.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(draft, target)
        journal.unlink()


def coalesce(ranges: Sequence[tuple[int, int]], spare: int) -> list[tuple[int, int]]:
    """Join ranges to longer ones, over gaps of at most `spare` bytes in all, the narrowest first.

    Args:
        ranges: Half-open, without overlaps.
        spare: Bytes.
    """
    ordered = sorted(ranges)
    gaps = sorted((after[0] - before[1], n) for n, (before, after) in enumerate(itertools.pairwise(ordered)))
    joined = set()
    for gap, n in gaps:
        if (spare := spare - gap) < 0:
            break
        joined.add(n)
    runs: list[tuple[int, int]] = []
    for n, (start, end) in enumerate(ordered):
        runs[-1:] = [(runs[-1][0], end)] if n and n - 1 in joined else [*runs[-1:], (start, end)]
    return runs


def _parts(pieces: Sequence[Piece]) -> Iterator[Part]:
    """Cut pieces into requests. A run of any length takes two at least, so that each has one to agree with."""
    files = {piece.file.url: piece.file for piece in pieces}
    size = max(MIN_PART, min(MAX_PART, sum(piece.end - piece.start for piece in pieces) // PARTS))
    for url, file in files.items():
        wanted = [(piece.start, piece.end) for piece in pieces if piece.file.url == url and piece.start < piece.end]
        for start, end in coalesce(wanted, spare=sum(e - s for s, e in wanted) // 100):
            overlap = min(OVERLAP, (end - start) // 256)
            share = -(-(end - start) // max(2, -(-(end - start) // size)))
            for first in range(start, end, share):
                last = min(first + share, end)
                yield Part(file, first, last, min(overlap, end - last))


def _places(part: Part, pieces: Sequence[Piece]) -> Iterator[tuple[int, int, int]]:
    """What of a part goes where: its offset in the part, its length, its offset in the local file."""
    for piece in pieces:
        start, end = max(piece.start, part.start), min(piece.end, part.end)
        if piece.file.url == part.file.url and start < end:
            yield start - part.start, end - start, piece.offset + start - piece.start


def _write(draft: Path, places: Sequence[tuple[int, int, int]], body: bytes) -> None:
    view = memoryview(body)
    with draft.open("r+b") as file:
        for start, length, offset in places:
            file.seek(offset)
            file.write(view[start : start + length])


def _checksum(draft: Path, places: Sequence[tuple[int, int, int]]) -> int:
    """CRC-32 of what of a part lies in the draft."""
    found = 0
    with draft.open("rb") as file:
        for _, length, offset in places:
            file.seek(offset)
            found = zlib.crc32(file.read(length), found)
    return found


class _Done(NamedTuple):
    """A part that was fetched."""

    checksum: int
    head: str  # its first bytes, in hexadecimal
    tail: str  # those that it repeats of the next one


def _read_journal(
    journal: Path, digest: str, draft: Path, places: Sequence[Sequence[tuple[int, int, int]]]
) -> dict[int, _Done]:
    """The parts that are there already; none when they are parts of something else.

    A part counts only if the draft holds what was written: a crash may have kept the journal and lost the data.
    """
    try:
        first, *lines = journal.read_text().splitlines()
        if json.loads(first) != digest:
            return {}
        entries = [json.loads(line) for line in lines if line.endswith("]")]  # the last one may be torn
        done = {number: _Done(*rest) for number, *rest in entries}
        return {number: each for number, each in done.items() if each.checksum == _checksum(draft, places[number])}
    except (OSError, ValueError, TypeError, IndexError):
        return {}


def _torn(parts: Sequence[Part], done: Mapping[int, _Done]) -> Part | None:
    """The first part whose repetition of the next one differs from it."""
    for number, part in enumerate(parts):
        if part.overlap and not done[number + 1].head.startswith(done[number].tail):
            return part
    return None


def _plain(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None
