"""What every command has in common: its result goes to stdout, its failure is one line on stderr."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from not_hf.errors import NotHFError

app = typer.Typer(
    name="not-hf",
    help="Cut layers out of a causal LM, train, share and transplant them (arXiv 2601.13580).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

CHECKPOINTS = "checkpoints"  # folder of an unfinished training run, within its output folder

_FLAGS = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else.")],
    "debug": Annotated[bool, typer.Option("--debug", envvar="NOT_HF_DEBUG", help="Show the traceback of a failure.")],
}


@dataclass(frozen=True)
class Result:
    """What a command found: for machines, for people, and why it counts as failed if it does."""

    data: dict[str, Any]
    view: str | RenderableType
    failure: str | None = None


def command(example: str, name: str | None = None) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a function that returns a `Result` a command of `app`, with `--json` and `--debug`."""

    def register(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **arguments: Any) -> None:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
                    result = function(**arguments)
            except (typer.Exit, typer.Abort, typer.TyperException):
                raise
            except Exception as error:  # the outermost boundary: whatever went wrong becomes one line
                if debug:
                    raise
                _end_progress_bars()
                typer.echo(f"error: {_one_line(error)}", err=True)
                raise typer.Exit(1) from error
            _show(result, as_json)

        signature = inspect.signature(function, eval_str=True)
        flags = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for key, annotation in _FLAGS.items()
        ]
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *flags]
        )
        app.command(name or function.__name__, epilog=f"Example: [bold]{example}[/bold]")(run)
        return run

    return register


@contextlib.contextmanager
def output_folder(folder: Path, force: bool) -> Iterator[None]:
    """Refuse a folder that holds something, unless forced.

    On failure a folder that was not there before is gone again, except for checkpoints to resume from.
    """
    existed = folder.exists()
    if folder.is_file():
        raise NotHFError(f"{folder} is a file; choose another --output")
    if existed and any(folder.iterdir()) and not force:
        raise NotHFError(f"{folder} is not empty; choose another --output, or write over it with --force")
    try:
        yield
    except BaseException:
        if not existed and not any(folder.glob(f"{CHECKPOINTS}/*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def facts(title: str, rows: dict[str, Any]) -> Table:
    """A table of names and values; what is `None` is left out."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, _text(value))
    return table


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_finite(result.data), indent=2, allow_nan=False, ensure_ascii=False))
    elif isinstance(result.view, str):
        typer.echo(result.view)
    else:
        # a pipe has no width: do not break the lines that go into it
        Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(result.view)
    if result.failure:
        typer.echo(f"error: {result.failure}", err=True)
        raise typer.Exit(1)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_progress_bars() -> None:
    """Move to a new line where a library left its bar unfinished."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError) and message:
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"
