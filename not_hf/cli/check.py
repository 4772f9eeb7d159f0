"""`not-hf check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from not_hf.cli.app import Result, command
from not_hf.cli.options import Donor, Mode, Position, Revision, Subfolder, Token, given

if TYPE_CHECKING:
    from not_hf.donor.compatibility import Mismatches


@command("not-hf check gpt2-kjv openai-community/gpt2 --position 1")
def check(
    donor: Donor,
    recipient: Annotated[str, typer.Argument(help="Recipient: folder or Hub ID.", show_default=False)],
    position: Position = None,
    mode: Annotated[Mode | None, typer.Option(help="As in extract.", show_default="the donor's")] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
) -> Result:
    """List everything that keeps a donor from working in a recipient, from configs and headers; exit 1 if anything."""
    from not_hf import check_donor

    found = check_donor(donor, recipient, position, mode, **given(revision=revision, subfolder=subfolder, token=token))
    count = f"{len(found)} mismatch{'es' if len(found) > 1 else ''}"
    return Result(
        {"donor": donor, **mismatches_as_data(recipient, found)},
        mismatches_as_text(donor, recipient, found),
        f"{donor} does not fit {recipient}: {count}" if found else None,
    )


def mismatches_as_data(recipient: str, found: Mismatches) -> dict[str, Any]:
    """Present the result of a check for `--json`."""
    return {
        "recipient": recipient,
        "compatible": not found,
        "mismatches": list(found),
        "differences": found.differences,
    }


def mismatches_as_text(donor: str, recipient: str, found: Mismatches) -> str:
    """Present the result of a check for people."""
    lines = list(found) or [f"{donor} fits {recipient}"]
    return "\n".join(lines + [f"differs: {each}" for each in found.differences])
