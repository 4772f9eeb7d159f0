"""Endpoints that hand content out: file resolution and LFS storage."""

from urllib.parse import quote

from .site import Site
from .store import Commit, File, Repo
from .upload import check_link, signed_link
from .wire import Request, Response, file_response
from .xet import restore


def resolve_model(site: Site, request: Request, repo: str, revision: str, path: str) -> Response:
    """A file of a model."""
    return _resolve(site, request, "model", repo, revision, path)


def resolve_dataset(site: Site, request: Request, repo: str, revision: str, path: str) -> Response:
    """A file of a dataset."""
    return _resolve(site, request, "dataset", repo, revision, path)


def lfs_get(site: Site, request: Request, oid: str) -> Response:
    """The content of an LFS file, over a signed link: no token comes here."""
    check_link(site, request, oid, "GET")
    path = site.store.content(oid)
    if not path.exists():
        restore(site, oid)
    return file_response(request, path, oid)


def _resolve(site: Site, request: Request, kind: str, repo: str, revision: str, path: str) -> Response:
    """A small file itself; for an LFS file its facts, and a redirect to the storage host."""
    found = site.downloadable(request, kind, repo)
    commit = site.commit(found, revision)
    file = site.file(commit, path)
    headers = {
        "X-Repo-Commit": commit.sha,
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path, safe='')}",
    }
    if file.sha256 is None:
        return file_response(request, site.store.content(file.key), file.key, headers)
    headers |= {
        "Location": signed_link(site, file.sha256, "GET"),
        "ETag": f'"{file.sha256}"',
        "X-Linked-ETag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
        **_xet_headers(site, found, commit, file),
    }
    return Response(302, headers)


def _xet_headers(site: Site, repo: Repo, commit: Commit, file: File) -> dict[str, str]:
    """What makes a client with Xet fetch the file through `hf_xet` instead of following the redirect."""
    if (xet_hash := site.xorbs.file_hash(file.key)) is None:
        return {}
    token = f"{site.endpoint}{repo.api}/xet-read-token/{commit.sha}"
    return {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": token, "Link": f'<{token}>; rel="xet-auth"'}
