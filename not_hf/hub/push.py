"""Pushing to the Hub: save into a temporary folder, then commit on top of the commit that the push started from."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypedDict

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from not_hf.cards.common import README
from not_hf.errors import reaching_hub, require_plain_token
from not_hf.hub.atomic_write import files_in, require_donor_folder, stale_weights

# Read before saving: the card to update, the kind of model, what may be outdated, and whether there is a tokenizer
_SEEDS = (README, CONFIG_NAME, GENERATION_CONFIG_NAME, TOKENIZER_CONFIG_FILE)
_ATTEMPTS = 5


class PushOptions(TypedDict, total=False):
    """Options of `push_to_hub`, with the meaning they have in transformers.

    `revision` is a branch, created from `main` if missing, or `refs/pr/N`; `private` applies to a new repo only.
    """

    commit_message: str | None
    commit_description: str | None
    private: bool | None
    token: bool | str | None
    revision: str | None
    create_pr: bool
    tags: str | list[str] | None


def push_folder(
    save: Callable[[str, str], None],
    repo_id: str,
    model_tags: list[str] | None = None,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | list[str] | None = None,
) -> CommitInfo:
    """Upload what `save(folder, repo_id)` writes, as one commit.

    Nothing is sent if saving fails, and an interrupted upload leaves the repo as it was. If somebody else commits in
    the meantime, or creates the repo, saving starts over on top of that commit, so that neither silently undoes the
    other. Weights of an earlier push that a load would prefer to the new ones are deleted in the same commit.

    Args:
        save: Called with a temporary folder that holds the repo's cards and configs, which it may update or remove.
        repo_id: `owner/name`, or a name in the namespace of the token's owner.
        model_tags: Tags for the card besides `tags`, from `add_model_tags`.
        commit_message: See `PushOptions` for this and the other arguments.

    Raises:
        NotHFError: The repo holds another kind of model.
        OSError: The Hub refuses, or cannot be reached.
    """
    require_plain_token(token)
    with reaching_hub(f"{repo_id} cannot be pushed"), _explaining_tokens(repo_id):
        api = HfApi(token=token)
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        all_tags = [*(model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
        for attempt in range(1, _ATTEMPTS + 1):
            head = _find_head(api, repo_id, revision)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    written, removed = _save(save, api, repo_id, head, folder, all_tags)
                    additions = [CommitOperationAdd(path, os.path.join(folder, path)) for path in written]
                    stale = [*removed, *stale_weights(head.files, written)]
                    deletions = [CommitOperationDelete(path) for path in stale]
                    with _ready(api, repo_id, head, private, additions) as parent:
                        return api.create_commit(
                            repo_id,
                            [*additions, *deletions],
                            commit_message=commit_message or "Upload organ",
                            commit_description=commit_description,
                            revision=revision,
                            create_pr=create_pr,
                            parent_commit=parent,
                        )
            except HfHubHTTPError as error:
                # 409: somebody else has just created the repo or the branch; 412: the parent is not the last commit
                if error.response.status_code not in (409, 412) or attempt == _ATTEMPTS:
                    raise
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class _Head:
    """The commit that a push starts from."""

    commit: str | None  # `None`: the repo does not exist yet
    files: list[str]
    new_branch: str | None = None  # to be created from it


def _find_head(api: HfApi, repo_id: str, revision: str | None) -> _Head:
    new_branch = None if revision in (None, DEFAULT_REVISION) else revision
    try:
        info, new_branch = api.model_info(repo_id, revision=revision), None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if new_branch is not None and new_branch.startswith("refs/"):
            raise  # a pull request, which cannot be created by its name
        if isinstance(error, RepositoryNotFoundError):
            return _Head(None, [], new_branch)
        info = api.model_info(repo_id)
    return _Head(info.sha, api.list_repo_files(repo_id, revision=info.sha), new_branch)


@contextlib.contextmanager
def _explaining_tokens(repo_id: str) -> Iterator[None]:
    """Say what to type if the Hub refuses the token, or misses one."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise PermissionError(
            f"{repo_id} cannot be pushed without a valid token (401): log in with `hf auth login`, or give a token "
            "that may write: token=..., --token"
        ) from error


def _save(
    save: Callable[[str, str], None], api: HfApi, repo_id: str, head: _Head, folder: str, tags: list[str]
) -> tuple[list[str], list[str]]:
    """Fill the folder, first with what is read before saving.

    Returns:
        The files that are new or changed, and those that `save` has removed.
    """
    seeds = {}
    for path in (path for path in head.files if PurePosixPath(path).name in _SEEDS and path.count("/") < 2):
        # copied: hf_hub_download gives a file in the cache, which must not change
        seeds[path] = Path(api.hf_hub_download(repo_id, path, revision=head.commit)).read_bytes()
        Path(folder, path).parent.mkdir(exist_ok=True)
        Path(folder, path).write_bytes(seeds[path])
    require_donor_folder(folder, repo_id)
    save(folder, repo_id)
    if tags:
        card = ModelCard.load(path := os.path.join(folder, README))
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(path)
    present = files_in(folder)
    written = [path for path in present if path not in seeds or Path(folder, path).read_bytes() != seeds[path]]
    return written, sorted(seeds.keys() - set(present))


@contextlib.contextmanager
def _ready(
    api: HfApi, repo_id: str, head: _Head, private: bool | None, additions: list[CommitOperationAdd]
) -> Iterator[str | None]:
    """Create the repo and the branch if missing; yields the commit that the new one must follow.

    A new branch is deleted again if the block fails before anything was committed to it.
    """
    if head.commit is None:
        api.create_repo(repo_id, private=private)
    parent = head.commit or api.model_info(repo_id).sha
    if head.new_branch is None:
        yield parent
        return
    api.preupload_lfs_files(repo_id, additions)  # first, so that a failed upload leaves no branch
    api.create_branch(repo_id, branch=head.new_branch, revision=parent)
    try:
        yield parent
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            if api.model_info(repo_id, revision=head.new_branch).sha == parent:
                api.delete_branch(repo_id, branch=head.new_branch)
        raise
