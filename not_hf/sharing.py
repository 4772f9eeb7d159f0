"""Pushing to the Hub: save into a temporary folder, then one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


def push_folder(
    save: Callable[[str, str], None],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Upload what `save(folder, repo_id)` writes, as one commit. Nothing is sent when saving fails.

    The arguments are those of `transformers`' `push_to_hub`. A `README.md` already in the repo is handed to `save`,
    which may update it.
    """
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            # hf_hub_download would link into the cache: copy, so that the update stays in the temporary folder
            text = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8")
            Path(folder, "README.md").write_text(text, encoding="utf-8")
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            pass  # the first push of this repo, branch or card
        save(folder, repo_id)
        if tags:
            card = ModelCard.load(path := os.path.join(folder, "README.md"))
            card.data.tags = sorted({*(card.data.tags or []), *tags})
            card.save(path)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload organ",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
