"""Endpoints that bring content in: how to upload, LFS transfer, commit."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .history import open_pull
from .site import Site
from .store import File, Repo, lfs_file, make_commit
from .wire import HubError, Request, Response, json_response

_LFS_SUFFIXES = (".bin", ".parquet", ".pt", ".safetensors")
_LFS_SIZE = 10_000_000  # bytes; larger files cannot live in git itself


def preupload(site: Site, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Say of each file whether it goes through LFS, and what its path holds now.

    The client compares `oid` with its own file to leave out what did not change.
    """
    found = site.target(request, kind, repo, revision)
    present = site.commit(found, revision).files
    answers = []
    for wanted in request.json()["files"]:
        large = wanted["size"] > _LFS_SIZE or wanted["path"].endswith(_LFS_SUFFIXES)
        old = present.get(wanted["path"])
        answer = {"path": wanted["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": old.key} if old else {}))
    return json_response({"files": answers})


def lfs_batch(site: Site, request: Request, kind: str, repo: str) -> Response:
    """Where to send each LFS object; one that is here already gets no address."""
    found = site.proposable(request, kind, repo)
    verify = {"href": f"{site.endpoint}/{found.prefix}{found.id}.git/info/lfs/verify"}
    objects = []
    for wanted in request.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if not site.store.content(wanted["oid"]).exists():
            upload = {"href": signed_link(site, wanted["oid"], "PUT"), "header": {}}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    # clients of huggingface_hub 1 ask; later ones use Xet wherever they can
    transfer = "xet" if site.has_xet and "xet" in request.json().get("transfers", ()) else "basic"
    return json_response({"transfer": transfer, "objects": objects})


def lfs_put(site: Site, request: Request, oid: str) -> Response:
    """Take in one LFS object over a signed link; refuse bytes that are not what they claim to be."""
    check_link(site, request, oid, "PUT")
    if (sha256 := site.store.add_lfs(request.body)) != oid:
        raise HubError(400, "BadDigest", f"{oid} was announced, content of sha256 {sha256} was sent")
    return Response()


def lfs_verify(site: Site, request: Request, kind: str, repo: str) -> Response:
    """Confirm that an LFS object arrived whole."""
    site.proposable(request, kind, repo)
    wanted = request.json()
    path = site.store.content(wanted["oid"])
    if not path.exists() or path.stat().st_size != wanted["size"]:
        raise HubError(404, "ObjectNotFound", f"LFS object {wanted['oid']} was not uploaded")
    return Response()


def signed_link(site: Site, oid: str, method: str) -> str:
    """An address on the storage host that works without a token."""
    return f"{site.storage}/lfs/{oid}?X-Amz-Signature={site.sign(f'{method} {oid}')}"


def check_link(site: Site, request: Request, oid: str, method: str) -> None:
    """Refuse an address that this server did not hand out for this use."""
    if request.first("X-Amz-Signature") != site.sign(f"{method} {oid}"):
        raise HubError(403, "SignatureDoesNotMatch", "the link was not signed by this Hub")


@dataclass
class _Draft:
    """A commit being put together; nothing of it shows until it is whole."""

    site: Site
    files: dict[str, File]
    header: dict[str, Any] = field(default_factory=dict)

    def add_file(self, value: dict[str, Any]) -> None:
        self.files[_checked(value["path"])] = self.site.store.add(base64.b64decode(value["content"]))

    def add_lfs_file(self, value: dict[str, Any]) -> None:
        path, oid = _checked(value["path"]), value["oid"]
        size = _stored_size(self.site, oid)
        if size is None or value.get("size", size) != size:
            raise HubError(400, "ObjectNotFound", f"{path} points to LFS object {oid}, not uploaded yet")
        self.files[path] = lfs_file(oid, size)

    def delete_file(self, value: dict[str, Any]) -> None:
        if self.files.pop(value["path"], None) is None:
            raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")

    def delete_folder(self, value: dict[str, Any]) -> None:
        folder = value["path"].rstrip("/") + "/"
        doomed = [path for path in self.files if path.startswith(folder)]
        if not doomed:
            raise HubError(404, "EntryNotFound", f"A folder with this name doesn't exist: {value['path']}")
        for path in doomed:
            del self.files[path]

    def set_header(self, value: dict[str, Any]) -> None:
        self.header = value


_OPERATIONS: dict[str, Callable[[_Draft, dict[str, Any]], None]] = {
    "header": _Draft.set_header,
    "file": _Draft.add_file,
    "lfsFile": _Draft.add_lfs_file,
    "deletedFile": _Draft.delete_file,
    "deletedFolder": _Draft.delete_folder,
}


def commit(site: Site, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Apply the operations of one commit, all or none, to a branch or to a new pull request."""
    found, author = site.target(request, kind, repo, revision), site.login(request)
    operations = list(_operations(request.body))
    to_pull = request.flag("create_pr")

    def apply(current: Repo) -> Repo:
        ref = current.find_ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision} is no branch")
        head = current.commits[current.refs[ref]]
        draft = _Draft(site, dict(head.files))
        for operation, value in operations:
            operation(draft, value)
        if not head.sha.startswith(draft.header.get("parentCommit", "")):
            raise HubError(412, "PreconditionFailed", "A commit has happened since: refresh and try again.")
        title, message = draft.header.get("summary", ""), draft.header.get("description", "")
        if to_pull:
            current = open_pull(current, author, title, message, ref)
            ref = f"refs/pr/{current.pulls[-1].num}"
        return current.with_commit(ref, make_commit(head, title, message, author, draft.files))

    changed = site.store.change(found, apply)
    sha = next(reversed(changed.commits))
    address = f"{site.endpoint}/{changed.prefix}{changed.id}"
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{address}/commit/{sha}", "hookOutput": ""}
    if to_pull:
        answer["pullRequestUrl"] = f"{address}/discussions/{changed.pulls[-1].num}"
    return json_response(answer)


def _operations(body: bytes) -> Iterator[tuple[Callable[[_Draft, dict[str, Any]], None], dict[str, Any]]]:
    for line in body.splitlines():
        item = json.loads(line)
        if item["key"] not in _OPERATIONS:
            raise HubError(400, "BadRequest", f"unknown operation {item['key']}")
        yield _OPERATIONS[item["key"]], item["value"]


def _checked(path: str) -> str:
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise HubError(400, "BadRequest", f"{path!r} is no path inside a repository")
    return path


def _stored_size(site: Site, sha256: str) -> int | None:
    """Size in bytes of an LFS object that came in by LFS or by Xet; None for one that did not."""
    path = site.store.content(sha256)
    if path.exists():
        return path.stat().st_size
    return site.xorbs.size(sha256)
