"""Branches, tags and pull requests of the local Hub."""

import pytest
from huggingface_hub import (
    HfApi,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RevisionNotFoundError,
)

from local_hub import Hub
from testing.hub import WEIGHTS, read, upload


def test_branches_tags_and_hashes(api: HfApi, repo: str) -> None:
    first = upload(api, repo, "x.txt", b"1")
    api.create_tag(repo, tag="v1/rc", tag_message="one")
    api.create_branch(repo, branch="dev/new", revision=first)
    second = upload(api, repo, "x.txt", b"2", revision="dev/new")

    contents = {revision: read(repo, "x.txt", revision=revision) for revision in ("main", "dev/new", "v1/rc", second)}
    assert contents == {"main": b"1", "dev/new": b"2", "v1/rc": b"1", second: b"2"}
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "dev/new": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1/rc": first}
    latest = {file.path: file.last_commit.oid for file in api.list_repo_tree(repo, revision=second, expand=True)}
    assert latest["x.txt"] == second != latest[".gitattributes"]
    titles = [commit.title for commit in api.list_repo_commits(repo, revision="dev/new")]
    assert titles == ["Upload x.txt with huggingface_hub"] * 2 + ["initial commit"]
    with pytest.raises(RevisionNotFoundError):
        read(repo, "x.txt", revision=second[:7])
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="dev/new")
    api.create_branch(repo, branch="dev/new", exist_ok=True)
    api.delete_branch(repo, branch="dev/new")
    api.delete_tag(repo, tag="v1/rc")
    assert [ref.name for ref in api.list_repo_refs(repo).branches] == ["main"]


def test_pull_requests_leave_main_alone(hub: Hub, api: HfApi, repo: str) -> None:
    hub.add_user("guest", token="hf_guest")
    guest = HfApi(token="hf_guest")
    info = guest.upload_file(repo_id=repo, path_in_repo="new.bin", path_or_fileobj=WEIGHTS, create_pr=True)
    assert (info.pr_revision, info.pr_num) == ("refs/pr/1", 1)
    assert read(repo, "new.bin", revision="refs/pr/1") == WEIGHTS
    assert "new.bin" not in api.list_repo_files(repo)
    upload(guest, repo, "more.txt", b"more", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="403"):
        upload(guest, repo, "more.txt", b"more")
    assert {"more.txt", "new.bin"} < set(api.list_repo_files(repo, revision="refs/pr/1"))
    assert api.create_pull_request(repo, title="second").git_reference == "refs/pr/2"
    assert [ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == [
        "refs/pr/1",
        "refs/pr/2",
    ]
    assert [(found.num, found.author) for found in api.get_repo_discussions(repo)] == [
        (2, "me"),
        (1, "guest"),
    ]
