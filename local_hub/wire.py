"""Requests, responses and errors as plain values, before any rule of the Hub applies."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

_CHUNK = 1 << 20  # bytes read from disk at a time
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class HubError(Exception):
    """An answer other than success.

    Always carries `X-Error-Code`: over plain http the client cannot tell a missing repository from its URL,
    it recognises the error by this header alone.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.response = json_response(
            {"error": message},
            status=status,
            headers={"X-Error-Code": code, "X-Error-Message": message, **(headers or {})},
        )


@dataclass(frozen=True)
class Request:
    """One HTTP request; `path` stays percent-encoded, for a `%2F` belongs to a name and a `/` parts two."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""

    @property
    def bearer(self) -> str | None:
        """The token sent, whoever it belongs to."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def json(self) -> Any:
        """The body as JSON; an error of the client's (400), not ours, when it is not."""
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, "BadRequest", f"the body is not JSON: {error}") from error

    def form(self) -> dict[str, list[str]]:
        """The body as a submitted form."""
        return parse_qs(self.body.decode())

    def first(self, name: str, default: str = "") -> str:
        """The first value of one query parameter."""
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """A boolean query parameter, in any of the spellings clients use."""
        return self.first(name).lower() in {"1", "true"}


@dataclass(frozen=True)
class FileSlice:
    """`length` bytes of a file from `offset`, read only when sent: a HEAD request never opens the file."""

    path: Path
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def first(self, length: int) -> "FileSlice":
        """The slice cut short."""
        return replace(self, length=length)

    def chunks(self) -> Iterator[bytes]:
        """The bytes, in pieces that fit in memory."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.length
            while left and (chunk := file.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Response:
    """One HTTP answer."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | FileSlice = b""

    def chunks(self) -> Iterator[bytes]:
        """The body, whichever form it has."""
        return self.body.chunks() if isinstance(self.body, FileSlice) else iter([self.body])


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON."""
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


def page(endpoint: str, request: Request, items: list[Any], size: int) -> Response:
    """One page of `items` as JSON; a `Link` header leads to the next one, as the Hub's lists do."""
    start = int(request.first("cursor", "0"))
    headers = {}
    if start + size < len(items):
        query = urlencode({**request.query, "cursor": [str(start + size)]}, doseq=True)
        headers["Link"] = f'<{endpoint}{request.path}?{query}>; rel="next"'
    return json_response(items[start : start + size], headers=headers)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Offset and length in bytes that a `Range` header selects out of `size`; None for an unusable header.

    Raises:
        HubError: 416, the range lies outside the file.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match[1] == match[2] == "":
        return None
    start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    end = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if start > end:
        message = f"range {header} lies outside the {size} bytes of the file"
        raise HubError(416, "RangeNotSatisfiable", message, {"Content-Range": f"bytes */{size}"})
    return start, end - start + 1


def file_response(request: Request, path: Path, etag: str, headers: Mapping[str, str] | None = None) -> Response:
    """A stored file, whole (200) or the single range asked for (206)."""
    size = path.stat().st_size
    headers = {
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        "ETag": f'"{etag}"',
        **(headers or {}),
    }
    wanted = request.headers.get("range", "")
    if request.headers.get("if-range", f'"{etag}"') != f'"{etag}"':
        wanted = ""  # the file changed since the client's first part: it needs all of it
    if (selected := parse_range(wanted, size)) is None:
        return Response(200, headers, FileSlice(path, 0, size))
    offset, length = selected
    headers["Content-Range"] = f"bytes {offset}-{offset + length - 1}/{size}"
    return Response(206, headers, FileSlice(path, offset, length))
