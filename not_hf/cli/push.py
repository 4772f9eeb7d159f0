"""`not-hf push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from not_hf.cli.app import CHECKPOINTS, Result, command, facts
from not_hf.cli.options import Token


@command("not-hf push gpt2-kjv me/gpt2-kjv --private")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a donor.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repo on the Hub; created if missing.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if missing.", show_default="main")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    token: Token = None,
    delta: Annotated[
        Literal["low_rank", "bfloat16"] | None,
        typer.Option(help="Push only how the layers differ from the base's, in fewer bytes.", show_default=False),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of --delta low_rank.", show_default="64")] = None,
    commit_message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload organ",
) -> Result:
    """Share a donor: check it strictly, then upload its folder, with its card, as one commit."""
    from not_hf import push_donor

    commit = push_donor(
        folder,
        repo_id,
        ignore=[CHECKPOINTS],
        delta=delta,
        rank=rank,
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
    )
    repo = commit.repo_url
    data = {"repo_id": repo.repo_id, "url": str(repo), "commit": commit.oid, "pull_request": commit.pr_url}
    return Result(data, facts("Pushed", data))
