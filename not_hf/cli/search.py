"""`not-hf search`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from not_hf.cli.app import Result, command
from not_hf.cli.options import Token


@command("not-hf search kjv --base-model openai-community/gpt2 --limit 5")
def search(
    words: Annotated[list[str] | None, typer.Argument(help="Words in the donors' IDs.", show_default=False)] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Model the donors were cut from: Hub ID.", show_default=False)
    ] = None,
    author: Annotated[
        str | None, typer.Option(help="User or organization that owns them.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of results.")] = 20,
    token: Token = None,
) -> Result:
    """Find donors on the Hub, the most downloaded first."""
    from not_hf import list_donors

    donors = list_donors(base_model, author, " ".join(words or []) or None, limit, token)
    found = [_as_data(asdict(donor)) for donor in donors]
    table = Table("donor", "base", "downloads", "likes", "changed", "access")
    for donor in found:
        access = "private" if donor["private"] else "gated" if donor["gated"] else "open"
        changed = (donor["last_modified"] or "")[:10]
        row = (donor["id"], donor["base_model"] or "–", donor["downloads"], donor["likes"], changed, access)
        table.add_row(*map(str, row))
    return Result({"donors": found}, table if found else "no donor found")


def _as_data(donor: dict[str, Any]) -> dict[str, Any]:
    changed = donor["last_modified"]
    return {**donor, "last_modified": changed and changed.isoformat()}
