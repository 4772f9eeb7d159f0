"""`not-hf run`."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from typing import Annotated

import typer

from not_hf.cli.app import app

# What follows the first argument belongs to the other tool, its --help too.
PASS_ON = {"allow_interspersed_args": False, "ignore_unknown_options": True}


@app.command(
    "run",
    epilog="Example: [bold]not-hf run lm_eval --model hf --model_args pretrained=me/gpt2-kjv --tasks arc_easy[/bold]",
    context_settings=PASS_ON,
)
def run(
    module: Annotated[str, typer.Argument(help="Module of another tool, as after `python -m`.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.", show_default=False)] = None,
) -> None:
    """Run another tool, in which donors load by ID like any model: for tools that import no plugin."""
    try:
        found = importlib.util.find_spec(module)
    except ImportError:  # nor its package
        found = None
    if found is None:
        raise typer.BadParameter(f"no module {module} is installed here", param_hint="MODULE")
    sys.argv = [module, *(arguments or [])]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
