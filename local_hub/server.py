"""The HTTP server: which address leads where, faults on demand, a record of what was served."""

import contextlib
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import download, history, repos, upload, xet
from .site import Site
from .store import Store
from .wire import FileSlice, HubError, Request, Response, parse_range
from .xorbs import Xorbs

DEFAULT_USER = "me"
DEFAULT_TOKEN = "hf_test"

_log = logging.getLogger("local_hub")

_REPO = "/api/{kind}s/{repo}"
_GIT = "/{prefix}{repo}.git/info/lfs"
# Method, address, endpoint. The first that fits is taken. GET also answers HEAD.
_ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("GET", "/api/whoami-v2", repos.whoami),
    ("GET", "/api/agent-harnesses", repos.agent_harnesses),
    ("POST", "/api/validate-yaml", repos.validate_card),
    ("POST", "/api/repos/create", repos.create),
    ("DELETE", "/api/repos/delete", repos.delete),
    ("GET", "/api/{kind}s", repos.search),
    ("PUT", f"{_REPO}/settings", repos.update_settings),
    ("GET", f"{_REPO}/auth-check", repos.check_access),
    ("GET", f"{_REPO}/auth-check/write", repos.check_write_access),
    ("GET", f"{_REPO}/tree/{{revision}}", history.tree),
    ("GET", f"{_REPO}/tree/{{revision}}/{{path}}", history.tree),
    ("POST", f"{_REPO}/paths-info/{{revision}}", history.paths_info),
    ("GET", f"{_REPO}/commits/{{revision}}", history.commits),
    ("GET", f"{_REPO}/refs", history.refs),
    ("POST", f"{_REPO}/branch/{{name}}", history.create_branch),
    ("DELETE", f"{_REPO}/branch/{{name}}", history.delete_branch),
    ("POST", f"{_REPO}/tag/{{name}}", history.create_tag),
    ("DELETE", f"{_REPO}/tag/{{name}}", history.delete_tag),
    ("POST", f"{_REPO}/discussions", history.create_discussion),
    ("GET", f"{_REPO}/discussions", history.discussions),
    ("GET", f"{_REPO}/discussions/{{num}}", history.discussion),
    ("POST", f"{_REPO}/preupload/{{revision}}", upload.preupload),
    ("POST", f"{_REPO}/commit/{{revision}}", upload.commit),
    ("GET", f"{_REPO}/revision/{{revision}}", repos.info),
    ("POST", f"{_GIT}/objects/batch", upload.lfs_batch),
    ("POST", f"{_GIT}/verify", upload.lfs_verify),
    ("PUT", "/lfs/{oid}", upload.lfs_put),
    ("GET", "/lfs/{oid}", download.lfs_get),
    ("GET", "/datasets/{repo}/resolve/{revision}/{path}", download.resolve_dataset),
    ("GET", "/{repo}/resolve/{revision}/{path}", download.resolve_model),
)
_XET_ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
    ("GET", f"{_REPO}/xet-read-token/{{revision}}", xet.read_token),
    ("GET", f"{_REPO}/xet-write-token/{{revision}}", xet.write_token),
    ("GET", "/cas/v1/chunks/default/{xet_hash}", xet.not_offered),
    ("POST", "/cas/v1/xorb-grants/default/{xet_hash}", xet.not_offered),
    ("POST", "/v1/telemetry", xet.not_offered),
    ("POST", "/cas/v2/shards", xet.not_offered),
    ("GET", "/cas/v2/reconstructions/{xet_hash}", xet.not_offered),
    ("POST", "/cas/v1/xorbs/default/{xet_hash}", xet.post_xorb),
    ("POST", "/cas/v1/shards", xet.post_shard),
    ("GET", "/cas/v1/reconstructions/{xet_hash}", xet.get_reconstruction),
    ("GET", "/xorb/{xet_hash}", xet.get_xorb),
)
# Comes last: a repository may be named without an owner (`gpt2`), so this address also fits those above.
_LAST_ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (("GET", _REPO, repos.info),)

_PLACEHOLDERS = {
    "kind": "(?P<kind>model|dataset)",
    "prefix": "(?P<prefix>datasets/)?",
    "repo": "(?P<repo>[^/]+/[^/]+|[^/]+)",
    "path": "(?P<path>.+)",
}


@dataclass(frozen=True)
class Record:
    """One request as served. `bytes` counts the body the server set out to send, headers excluded."""

    method: str
    path: str  # percent-encoded, without the query
    status: int
    range: str | None  # the Range header as sent
    bytes: int


@dataclass(frozen=True)
class Fault:
    """How one answer goes wrong; the parts can be combined."""

    status: int | None = None  # answer with this error, 429 or 500 say, and do nothing
    retry_after: int | None = None  # seconds, sent with `status`
    truncate: bool = False  # announce the whole body, send half of it, hang up
    ignore_range: bool = False  # send the whole file with 200 where a range was asked for
    shift_range: int = 0  # bytes; send a range that begins this much later than the answer claims
    honest: bool = False  # claim the shifted range
    claim: bool = False  # with `ignore_range`: answer 206 and claim the range that was asked for
    delay: float = 0  # seconds before anything happens
    etag: str | None = None  # claim that the file is another one


FaultHook = Callable[[str, str, Mapping[str, str]], Fault | None]


class Hub:
    """A Hub that serves one folder from a background thread; also a context manager.

    Args:
        root: folder that holds everything; a later Hub finds it all there again.
        xet: whether clients can use Xet storage. Without it they need HF_HUB_DISABLE_XET=1 to upload, as the
            client never asks the server which storage it has.
        port: 0 picks a free one.
    """

    def __init__(self, root: Path | str, xet: bool = False, port: int = 0) -> None:
        self._root = Path(root).resolve()
        self._port = port
        self._xet = xet
        self._routes = _compile(_ROUTES + (_XET_ROUTES if xet else ()) + _LAST_ROUTES)
        self._users = {DEFAULT_TOKEN: DEFAULT_USER}
        self._server: _Server | None = None
        self._site: Site | None = None
        self.requests: list[Record] = []
        self.in_flight: set[int] = set()  # threads that are answering a request, delays included
        self.fault: FaultHook | None = None

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return self._running.endpoint

    def start(self) -> "Hub":
        """Serve until `stop`; returns once the server listens."""
        self._server = _Server(self, self._port)
        port = self._server.server_address[1]
        self._site = Site(
            endpoint=f"http://127.0.0.1:{port}",
            storage=f"http://localhost:{port}",
            store=Store(self._root),
            users=self._users,
            secret=secrets.token_bytes(16),
            xorbs=Xorbs(self._root / "xet"),
            has_xet=self._xet,
        )
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="local_hub", daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and cut the connections that clients keep open."""
        if self._server is not None:
            self._server.close()
            self._server = self._site = None

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def add_user(self, name: str, token: str) -> None:
        """Let another user in."""
        self._users[token] = name

    def gate(self, repo_id: str, users: tuple[str, ...] = (), kind: str = "model") -> None:
        """Let only the owner and the named users read the files of a repository."""
        self._change(kind, repo_id, gated="auto", allowed=list(users))

    def rate(self, repo_id: str, downloads: int, likes: int, kind: str = "model") -> None:
        """Make a repository as popular as that."""
        self._change(kind, repo_id, downloads=downloads, likes=likes)

    def _change(self, kind: str, repo_id: str, **values: Any) -> None:
        store = self._running.store
        if (repo := store.find(kind, repo_id)) is None:
            raise ValueError(f"no {kind} {repo_id}; create it first")
        store.change(repo, lambda current: replace(current, **values))

    def answer(self, request: Request) -> Response:
        """What the Hub says to a request."""
        try:
            endpoint, values = self._find(request)
            return endpoint(self._running, request, **values)
        except HubError as error:
            return error.response
        except Exception:
            _log.exception("%s %s", request.method, request.path)
            return HubError(500, "InternalError", "this Hub failed; its log says where").response

    @property
    def _running(self) -> Site:
        if self._site is None:
            raise RuntimeError("the Hub is not running; call start() first")
        return self._site

    def _find(self, request: Request) -> tuple[Callable[..., Response], dict[str, str]]:
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, endpoint in self._routes:
            if route_method == method and (match := pattern.fullmatch(request.path)):
                return endpoint, _values(match)
        _log.warning("no endpoint for %s %s", request.method, request.path)
        raise HubError(404, "UnknownEndpoint", f"this Hub has no endpoint {request.method} {request.path}")


def _compile(
    routes: tuple[tuple[str, str, Callable[..., Response]], ...],
) -> list[tuple[str, re.Pattern[str], Callable[..., Response]]]:
    def expand(match: re.Match[str]) -> str:
        return _PLACEHOLDERS.get(match[1], f"(?P<{match[1]}>[^/]+)")

    return [
        (method, re.compile(re.sub(r"\{(\w+)\}", expand, address.replace(".", r"\."))), endpoint)
        for method, address, endpoint in routes
    ]


def _values(match: re.Match[str]) -> dict[str, str]:
    """Arguments for the endpoint: decoded only now, when a `%2F` can no longer be taken for a separator."""
    values = match.groupdict()
    if "prefix" in values:
        values["kind"] = "dataset" if values.pop("prefix") else "model"
    return {name: unquote(value) for name, value in values.items()}


class _Server(ThreadingHTTPServer):
    """A server that can be stopped while clients hold connections open, as the Hub's clients do."""

    daemon_threads = True

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("connection lost", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, applies a fault if a test wants one, writes the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        self.server.hub.in_flight.add(threading.get_ident())
        try:
            self._respond()
        finally:
            self.server.hub.in_flight.discard(threading.get_ident())

    def _respond(self) -> None:
        hub, address = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, address.path, parse_qs(address.query), headers, self._read_body())
        fault = (hub.fault and hub.fault(request.method, request.path, headers)) or Fault()
        response = _answer(hub, request, fault)
        body = response.body if self.command != "HEAD" else b""
        sent = len(body) // 2 if fault.truncate else len(body)
        if xet.INTERNAL not in headers:
            record = Record(request.method, request.path, response.status, headers.get("range"), sent)
            hub.requests.append(record)
        self._write(response, body.first(sent) if isinstance(body, FileSlice) else body[:sent])
        self.close_connection |= fault.truncate

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _write(self, response: Response, body: bytes | FileSlice) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        for chunk in replace(response, body=body).chunks():
            self.wfile.write(chunk)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


def _answer(hub: Hub, request: Request, fault: Fault) -> Response:
    """The Hub's answer, with the fault worked in."""
    time.sleep(fault.delay)
    if fault.status:
        headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
        return HubError(fault.status, "Fault", "this fault was asked for", headers).response
    asked = request.headers.get("range", "")
    if fault.ignore_range:
        kept = {name: value for name, value in request.headers.items() if name != "range"}
        request = replace(request, headers=kept)
    response = hub.answer(request)
    if fault.claim and (wanted := parse_range(asked, len(response.body))):
        offset, length = wanted
        claimed = {"Content-Range": f"bytes {offset}-{offset + length - 1}/{len(response.body)}"}
        response = replace(response, status=206, headers={**response.headers, **claimed})
    if response.status == 206 and isinstance(response.body, FileSlice):
        moved = replace(response.body, offset=response.body.offset + fault.shift_range)
        claimed = dict(response.headers)
        if fault.honest:
            size = claimed["Content-Range"].rpartition("/")[2]
            claimed["Content-Range"] = f"bytes {moved.offset}-{moved.offset + moved.length - 1}/{size}"
        response = replace(response, headers=claimed, body=moved)
    if fault.etag is not None:
        claimed = {name: f'"{fault.etag}"' for name in ("ETag", "X-Linked-ETag") if name in response.headers}
        response = replace(response, headers={**response.headers, **claimed})
    return response
