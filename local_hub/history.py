"""Endpoints about what a repository holds and held: listings, commits, branches, tags, pull requests."""

import hashlib
from dataclasses import replace
from typing import Any

from .site import Site
from .store import Commit, File, Pull, Repo, lfs_pointer, now
from .wire import HubError, Request, Response, json_response, page

_PAGE_SIZE = 1000
_PAGE_SIZE_EXPANDED = 50


def tree(site: Site, request: Request, kind: str, repo: str, revision: str, path: str = "") -> Response:
    """The files and folders below one folder."""
    found = site.readable(request, kind, repo)
    commit = site.commit(found, revision)
    below = f"{path.strip('/')}/" if path else ""
    paths = sorted(name for name in [*commit.files, *_folders(commit)] if name.startswith(below))
    if below and not paths:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
    if not request.flag("recursive"):
        paths = [name for name in paths if "/" not in name[len(below) :]]
    expand = request.flag("expand")
    entries = [_entry(site, found, commit, name, expand) for name in paths]
    return page(site.endpoint, request, entries, _PAGE_SIZE_EXPANDED if expand else _PAGE_SIZE)


def paths_info(site: Site, request: Request, kind: str, repo: str, revision: str) -> Response:
    """The named files and folders; one that does not exist is left out."""
    found = site.readable(request, kind, repo)
    commit = site.commit(found, revision)
    form = request.form()
    known = {*commit.files, *_folders(commit)}
    expand = form.get("expand") == ["true"]
    wanted = (path.strip("/") for path in form.get("paths", []))
    return json_response([_entry(site, found, commit, path, expand) for path in wanted if path in known])


def commits(site: Site, request: Request, kind: str, repo: str, revision: str) -> Response:
    """The commits of one revision, newest first."""
    found = site.readable(request, kind, repo)
    listed = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in found.history(site.commit(found, revision))
    ]
    return page(site.endpoint, request, listed, _PAGE_SIZE_EXPANDED)


def refs(site: Site, request: Request, kind: str, repo: str) -> Response:
    """Branches, tags and, if asked for, pull requests."""
    found = site.readable(request, kind, repo)

    def below(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in found.refs.items()
            if ref.startswith(prefix)
        ]

    answer = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
    if request.flag("include_prs"):
        answer["pullRequests"] = below("refs/pr/")
    return json_response(answer)


def create_branch(site: Site, request: Request, kind: str, repo: str, name: str) -> Response:
    """Create a branch, from `main` unless told otherwise."""
    start = request.json().get("startingPoint", "main")
    return _create_ref(site, request, kind, repo, f"refs/heads/{name}", start)


def create_tag(site: Site, request: Request, kind: str, repo: str, name: str) -> Response:
    """Tag the revision that the address names; the tag's own name is in the body."""
    return _create_ref(site, request, kind, repo, f"refs/tags/{request.json()['tag']}", name)


def delete_branch(site: Site, request: Request, kind: str, repo: str, name: str) -> Response:
    """Delete any branch but `main`."""
    if name == "main":
        raise HubError(403, "Forbidden", "the default branch cannot be deleted")
    return _delete_ref(site, request, kind, repo, f"refs/heads/{name}")


def delete_tag(site: Site, request: Request, kind: str, repo: str, name: str) -> Response:
    """Delete a tag."""
    return _delete_ref(site, request, kind, repo, f"refs/tags/{name}")


def open_pull(repo: Repo, author: str, title: str, description: str, base: str) -> Repo:
    """The repository with one more pull request, whose ref starts at the base."""
    pull = Pull(len(repo.pulls) + 1, title, description, author, now(), base)
    return replace(repo, pulls=[*repo.pulls, pull]).with_ref(f"refs/pr/{pull.num}", repo.refs[base])


def create_discussion(site: Site, request: Request, kind: str, repo: str) -> Response:
    """Open an empty pull request, as the client does before it uploads to one in several commits."""
    found, author, wanted = site.proposable(request, kind, repo), site.login(request), request.json()
    if not wanted.get("pullRequest"):
        raise HubError(501, "NotImplemented", "this Hub keeps pull requests only, no discussions")
    title, description = wanted["title"], wanted["description"]
    opened = site.store.change(
        found, lambda current: open_pull(current, author, title, description, "refs/heads/main")
    )
    return json_response(_discussion(opened, opened.pulls[-1]))


def discussions(site: Site, request: Request, kind: str, repo: str) -> Response:
    """All pull requests, newest first, on a single page."""
    found = site.readable(request, kind, repo)
    listed = [_discussion(found, pull) for pull in reversed(found.pulls)]
    start = int(request.first("p", "0")) * max(len(listed), 1)
    return json_response({"discussions": listed[start:], "count": len(listed), "start": start})


def discussion(site: Site, request: Request, kind: str, repo: str, num: str) -> Response:
    """One pull request."""
    found = site.readable(request, kind, repo)
    pull = next((pull for pull in found.pulls if str(pull.num) == num), None)
    if pull is None:
        raise HubError(404, "DiscussionNotFound", f"no pull request {num} on {repo}")
    return json_response(_discussion(found, pull))


def _create_ref(site: Site, request: Request, kind: str, repo: str, ref: str, start: str) -> Response:
    found = site.writable(request, kind, repo)
    sha = site.commit(found, start).sha

    def create(current: Repo) -> Repo:
        if ref in current.refs:
            raise HubError(409, "ReferenceExists", f"Reference already exists: {ref}")
        return current.with_ref(ref, sha)

    site.store.change(found, create)
    return Response()


def _delete_ref(site: Site, request: Request, kind: str, repo: str, ref: str) -> Response:
    found = site.writable(request, kind, repo)
    if ref not in found.refs:
        raise HubError(404, "RevisionNotFound", f"Reference does not exist: {ref}")
    site.store.change(found, lambda current: current.without_ref(ref))
    return Response()


def _folders(commit: Commit) -> set[str]:
    """Every folder that holds a file, however deep."""
    return {path[:end] for path in commit.files for end, letter in enumerate(path) if letter == "/"}


def _below(commit: Commit | None, path: str) -> dict[str, File]:
    """The named file, or all files of the named folder."""
    files = commit.files.items() if commit else ()
    return {name: file for name, file in files if name == path or name.startswith(f"{path}/")}


def _entry(site: Site, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": path}
    if (file := commit.files.get(path)) is None:
        listing = sorted((name, file.oid) for name, file in _below(commit, path).items())
        entry |= {"type": "directory", "oid": hashlib.sha1(repr(listing).encode()).hexdigest(), "size": 0}
    else:
        entry |= {"type": "file", "oid": file.oid, "size": file.size}
        if file.sha256:
            pointer_size = len(lfs_pointer(file.sha256, file.size))
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer_size}
            if xet_hash := site.xorbs.file_hash(file.sha256):
                entry["xetHash"] = xet_hash
    if expand:
        changed = _last_change(repo, commit, path)
        entry["lastCommit"] = {"id": changed.sha, "title": changed.title, "date": changed.date}
    return entry


def _last_change(repo: Repo, commit: Commit, path: str) -> Commit:
    """The newest commit that made the path what it is."""
    now_there = _below(commit, path)
    for older in repo.history(commit):
        before = repo.commits[older.parent] if older.parent else None
        if _below(before, path) != now_there:
            return older
    raise AssertionError(f"{path} is in no commit")


def _discussion(repo: Repo, pull: Pull) -> dict[str, Any]:
    return {
        "num": pull.num,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": pull.date,
        "status": "open",
        "isPullRequest": True,
        "repo": {"name": repo.id, "type": repo.kind},
        "changes": {"base": pull.base},
        "filesWithConflicts": [],
        "events": [],
    }
