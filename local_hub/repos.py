"""Endpoints about repositories as a whole: who am I, create, delete, settings, info, search, card checks."""

import json
from dataclasses import replace
from typing import Any

from . import card
from .site import Site, can_see
from .store import GIT_ATTRIBUTES, Commit, Repo, make_commit, now
from .wire import HubError, Request, Response, json_response, page

_PAGE_SIZE = 1000
_BRIEF = (
    *("createdAt", "downloads", "gated", "library_name", "likes"),
    *("modelId", "pipeline_tag", "private", "tags"),
)
_NEVER_LISTED = {"baseModels", "childrenModelCount", "usedStorage"}  # shown of one repository at a time
_FULL = (*_BRIEF, "author", "disabled", "lastModified", "sha", "siblings")


def whoami(site: Site, request: Request) -> Response:
    """The user behind the token."""
    name = site.login(request)
    token = {"displayName": "test", "role": "write", "createdAt": "2024-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": token}
    user = {"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth}
    return json_response(user)


def agent_harnesses(site: Site, request: Request) -> Response:
    """The coding agents a client should name in its user agent, which it asks for once a day: none."""
    return json_response({"standardEnvVars": [], "harnesses": {}})


def create(site: Site, request: Request) -> Response:
    """Create a repository; 409 when it exists, which the client forgives with `exist_ok`."""
    viewer, wanted = site.login(request), request.json()
    kind, owner = wanted.get("type") or "model", wanted.get("organization") or viewer
    if owner != viewer:
        raise HubError(403, "Forbidden", f"You don't have the rights to create a {kind} under {owner}")
    private = wanted.get("visibility") == "private" or wanted.get("private", False)
    repo = Repo(kind=kind, id=f"{owner}/{wanted['name']}", created=now(), private=private)
    first = make_commit(None, "initial commit", "", owner, {".gitattributes": site.store.add(GIT_ATTRIBUTES)})
    answer = {"url": f"{site.endpoint}/{repo.prefix}{repo.id}", "name": repo.id}
    if not site.store.create(repo.with_commit("refs/heads/main", first)):
        error = f"You already created this {kind} repo: {repo.id}"
        headers = {"X-Error-Code": "RepoExists", "X-Error-Message": error}
        return json_response({"error": error, **answer}, status=409, headers=headers)
    return json_response(answer)


def delete(site: Site, request: Request) -> Response:
    """Delete a repository."""
    wanted = request.json()
    owner = wanted.get("organization") or site.login(request)
    site.store.delete(site.writable(request, wanted.get("type") or "model", f"{owner}/{wanted['name']}"))
    return Response()


def update_settings(site: Site, request: Request, kind: str, repo: str) -> Response:
    """Change who sees a repository and whether it is gated."""
    wanted = request.json()
    changes = {"private": wanted["visibility"] == "private"} if "visibility" in wanted else {}
    changes |= {"gated": wanted["gated"]} if "gated" in wanted else {}
    site.store.change(site.writable(request, kind, repo), lambda current: replace(current, **changes))
    return json_response(changes)


def check_access(site: Site, request: Request, kind: str, repo: str) -> Response:
    """Succeed if the asker may read the files."""
    site.downloadable(request, kind, repo)
    return Response()


def check_write_access(site: Site, request: Request, kind: str, repo: str) -> Response:
    """Succeed if the asker may change the repository."""
    site.writable(request, kind, repo)
    return Response()


def info(site: Site, request: Request, kind: str, repo: str, revision: str = "main") -> Response:
    """Everything about one repository at one revision."""
    found = site.readable(request, kind, repo)
    commit = site.commit(found, revision)
    described = describe(site, found, commit)
    if request.flag("blobs"):
        described["siblings"] = [_sibling(path, commit) for path in sorted(commit.files)]
    if "expand" in request.query:
        described = _select(described, request.query["expand"])
    return json_response(described)


def search(site: Site, request: Request, kind: str) -> Response:
    """The repositories that match every condition asked for, newest first unless sorted otherwise."""
    viewer = site.viewer(request)
    if refused := _NEVER_LISTED & set(request.query.get("expand", [])):
        raise HubError(400, "BadRequest", f"cannot expand {', '.join(sorted(refused))} of a list")
    visible = (repo for repo in site.store.all(kind) if can_see(repo, viewer))
    described = [describe(site, repo, site.commit(repo, "main")) for repo in visible]
    found = [item for item in described if _matches(item, request)]
    found.sort(key=lambda item: item.get(request.first("sort", "createdAt")) or 0, reverse=True)
    fields = list(_FULL if request.flag("full") else _BRIEF)
    fields += [field for field in ("cardData", "config") if request.flag(field)]
    fields = request.query.get("expand", fields)
    size = min(int(request.first("limit", str(_PAGE_SIZE))), _PAGE_SIZE)
    return page(site.endpoint, request, [_select(item, fields) for item in found], size)


def validate_card(site: Site, request: Request) -> Response:
    """Check the metadata of a README the way the Hub does before it takes one."""
    errors, warnings = card.check_card(request.json().get("content", ""))
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    headers = {"X-Error-Code": "InvalidMetadata", "X-Error-Message": "; ".join(errors)} if errors else {}
    return json_response(answer, status=400 if errors else 200, headers=headers)


def describe(site: Site, repo: Repo, commit: Commit) -> dict[str, Any]:
    """All the Hub says about a repository at one commit."""
    metadata = card.card_data(site.text(commit, "README.md"))
    described = {
        "_id": repo.id,
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.sha,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "cardData": metadata,
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        "usedStorage": sum(file.size for file in commit.files.values()),
    }
    if repo.kind == "dataset":
        return described | {"tags": card.dataset_tags(metadata)}
    config = _model_config(site, commit)
    return described | {
        "modelId": repo.id,
        "tags": card.model_tags(metadata, commit.files, config),
        "library_name": card.library_name(metadata, commit.files, config),
        "pipeline_tag": metadata.get("pipeline_tag"),
        "config": {key: config[key] for key in ("architectures", "model_type") if key in config},
    }


def _model_config(site: Site, commit: Commit) -> dict[str, Any]:
    try:
        config = json.loads(site.text(commit, "config.json") or "{}")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def _select(described: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    return {key: value for key, value in described.items() if key in ("_id", "id", *fields)}


def _sibling(path: str, commit: Commit) -> dict[str, Any]:
    file = commit.files[path]
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}} if file.sha256 else {}
    return {"rfilename": path, "size": file.size, "blobId": file.oid, **lfs}


def _matches(item: dict[str, Any], request: Request) -> bool:
    query = request.query
    return (
        set(query.get("filter", [])) <= set(item["tags"])
        and all(word in item["id"].lower() for word in request.first("search").lower().split())
        and query.get("author", [item["author"]]) == [item["author"]]
        and query.get("pipeline_tag", [item.get("pipeline_tag")]) == [item.get("pipeline_tag")]
        and query.get("gated", [str(bool(item["gated"])).lower()]) == [str(bool(item["gated"])).lower()]
    )
