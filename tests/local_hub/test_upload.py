"""Commits to the local Hub: small files, large ones, copies, deletions, or nothing at all."""

import os

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
)
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import get_session

from local_hub import Hub
from testing.hub import CARD, WEIGHTS, read, served, upload


def test_unchanged_files_make_no_commit(hub: Hub, api: HfApi, repo: str) -> None:
    files = {"config.json": b"{}", "model.bin": WEIGHTS}
    first = api.create_commit(
        repo, [CommitOperationAdd(path, content) for path, content in files.items()], commit_message="both"
    )
    hub.requests.clear()
    again = api.create_commit(
        repo, [CommitOperationAdd(path, content) for path, content in files.items()], commit_message="again"
    )
    assert again.oid == first.oid
    assert served(hub, "POST", "/commit/") == served(hub, "PUT", "/lfs/") == []


def test_files_are_copied_and_deleted(api: HfApi, repo: str) -> None:
    upload(api, repo, "a/model.bin", WEIGHTS)
    upload(api, repo, "a/note.txt", b"note")
    operations = [
        CommitOperationCopy("a/model.bin", "b/model.bin"),
        CommitOperationCopy("a/note.txt", "b/note.txt"),
        CommitOperationDelete("a/"),
    ]
    api.create_commit(repo, operations, commit_message="move")
    assert read(repo, "b/model.bin") == WEIGHTS
    api.delete_files(repo, ["b/*.txt"])
    assert api.list_repo_files(repo) == [".gitattributes", "b/model.bin"]


def test_storage_refuses_other_content_than_announced(api: HfApi, repo: str) -> None:
    content = os.urandom(100)  # the store knows no such file yet, whichever tests ran before
    announced = UploadInfo.from_bytes(content)
    ((answer,), _, _) = post_lfs_batch_info([announced], token=None, repo_type="model", repo_id=repo)
    link = answer["actions"]["upload"]["href"]
    assert get_session().put(link, content=content[:-1]).status_code == 400
    assert get_session().put(link, content=content).status_code == 200
    ((answer,), _, _) = post_lfs_batch_info([announced], token=None, repo_type="model", repo_id=repo)
    assert "actions" not in answer


def test_failed_commit_changes_nothing(api: HfApi, repo: str) -> None:
    before = upload(api, repo, "x.txt", b"1")
    new = CommitOperationAdd("new.txt", b"new")
    with pytest.raises(EntryNotFoundError, match="trailing '/'"):
        api.create_commit(repo, [new, CommitOperationDelete("missing.txt")], commit_message="bad")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, [new], commit_message="late", parent_commit="0" * 40)
    assert api.model_info(repo).sha == before
    assert api.list_repo_files(repo) == [".gitattributes", "x.txt"]


def test_commit_refuses_lfs_content_that_was_not_uploaded(api: HfApi, repo: str) -> None:
    ghost = CommitOperationAdd("model.bin", WEIGHTS + b"never sent")
    ghost._is_uploaded, ghost._upload_mode = True, "lfs"
    with pytest.raises(BadRequestError, match="not uploaded"):
        api.create_commit(repo, [CommitOperationAdd("a.txt", b"a"), ghost], commit_message="ghost")
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_card_validation(api: HfApi, repo: str) -> None:
    ModelCard(CARD).validate()
    with pytest.raises(ValueError, match='"tags" must be an array'):
        upload(api, repo, "README.md", CARD.replace("[organ]", "organ").encode())
    with pytest.raises(ValueError, match="base_model_relation"):
        ModelCard(CARD.replace("adapter", "parent")).validate()
