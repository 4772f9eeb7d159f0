"""Pushing to the Hub: save into a temporary folder, then one commit on top of what was there when it began."""

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
from transformers.utils import CONFIG_NAME

from not_hf.cards.common import README
from not_hf.errors import reaching_hub
from not_hf.hub.atomic_write import files_in, require_donor_folder, stale_weights

_SEEDS = (README, CONFIG_NAME)  # what saving looks at before it writes: the card to update, the kind of model
_ATTEMPTS = 5


class PushOptions(TypedDict, total=False):
    """Options of `push_to_hub`, with the meaning they have in transformers.

    `revision` is a branch, made from `main` when missing, or `refs/pr/N`; `private` counts for a new repo only.
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

    Nothing is sent when saving fails, and an upload that dies leaves the repo as it was. When somebody else commits
    in the meantime, saving begins anew on top of that, so that neither commit undoes the other unseen. Weights of an
    earlier push that a load would prefer to the new ones are deleted in the same commit.

    Args:
        save: Gets a temporary folder with the cards and configs that the repo has, which it may update.
        repo_id: `owner/name`, or a name in the namespace of the token's owner.
        model_tags: For the card, besides `tags`: those of `add_model_tags`.
        commit_message: The other arguments are described at `PushOptions`.

    Raises:
        NotHFError: The repo holds another kind of model.
        OSError: The Hub refuses, or cannot be reached.
    """
    with reaching_hub(f"{repo_id} cannot be pushed"):
        api = HfApi(token=token)
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        all_tags = [*(model_tags or []), *([tags] if isinstance(tags, str) else tags or [])]
        for attempt in range(1, _ATTEMPTS + 1):
            head = _find_head(api, repo_id, revision)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    written = _save(save, api, repo_id, head, folder, all_tags)
                    additions = [CommitOperationAdd(path, os.path.join(folder, path)) for path in written]
                    deletions = [CommitOperationDelete(path) for path in stale_weights(head.files, written)]
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
                if error.response.status_code != 412 or attempt == _ATTEMPTS:  # 412: the parent is not the last commit
                    raise
    raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True)
class _Head:
    """The commit that a push starts from."""

    commit: str | None  # `None`: there is no such repo yet
    files: list[str]
    new_branch: str | None = None  # to be made from it


def _find_head(api: HfApi, repo_id: str, revision: str | None) -> _Head:
    new_branch = None if revision in (None, DEFAULT_REVISION) else revision
    try:
        info, new_branch = api.model_info(repo_id, revision=revision), None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if new_branch is not None and new_branch.startswith("refs/"):
            raise  # no branch
        if isinstance(error, RepositoryNotFoundError):
            return _Head(None, [], new_branch)
        info = api.model_info(repo_id)
    return _Head(info.sha, api.list_repo_files(repo_id, revision=info.sha), new_branch)


def _save(
    save: Callable[[str, str], None], api: HfApi, repo_id: str, head: _Head, folder: str, tags: list[str]
) -> list[str]:
    """Have the folder filled, beginning with what saving looks at; returns the files that are not as they were."""
    seeds = {}
    for path in (path for path in head.files if PurePosixPath(path).name in _SEEDS and path.count("/") < 2):
        # hf_hub_download would link into the cache: copy, so that the update stays in the temporary folder
        seeds[path] = Path(api.hf_hub_download(repo_id, path, revision=head.commit)).read_bytes()
        Path(folder, path).parent.mkdir(exist_ok=True)
        Path(folder, path).write_bytes(seeds[path])
    require_donor_folder(folder, repo_id)
    save(folder, repo_id)
    if tags:
        card = ModelCard.load(path := os.path.join(folder, README))
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        card.save(path)
    return [path for path in files_in(folder) if path not in seeds or Path(folder, path).read_bytes() != seeds[path]]


@contextlib.contextmanager
def _ready(
    api: HfApi, repo_id: str, head: _Head, private: bool | None, additions: list[CommitOperationAdd]
) -> Iterator[str | None]:
    """See to it that there is a repo and a branch to commit to; yields the commit that must come before.

    A new branch is gone again when the block fails before anything was committed to it.
    """
    if head.commit is None:
        api.create_repo(repo_id, private=private)
    parent = head.commit or api.model_info(repo_id).sha
    if head.new_branch is None:
        yield parent
        return
    api.preupload_lfs_files(repo_id, additions)  # the branch shows only when nothing is left to do but the commit
    api.create_branch(repo_id, branch=head.new_branch, revision=parent)
    try:
        yield parent
    except BaseException:
        with contextlib.suppress(Exception):  # the error above is the one to tell
            if api.model_info(repo_id, revision=head.new_branch).sha == parent:
                api.delete_branch(repo_id, branch=head.new_branch)
        raise
