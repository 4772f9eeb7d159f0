"""The command line, `not-hf`. torch and transformers are imported by the commands that need them, not here."""

from __future__ import annotations

from typing import Annotated

import typer

from not_hf.cli import finding, importing, models, organs, training, transplant  # noqa: F401 (they register commands)
from not_hf.cli.run import app
from not_hf.version import __version__

__all__ = ["app"]

_ORDER = (  # of a first use
    *("extract", "import", "train", "eval", "generate", "inspect", "check"),
    *("push", "search", "transplant", "merge"),
)
app.registered_commands.sort(key=lambda info: _ORDER.index(str(info.name)))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"not_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Cut layers out of a causal LM, train them, share them and transplant them (arXiv 2601.13580)."""
