"""The Typer app, and what all commands share: results go to stdout, a failure is one line on stderr.

This module is imported for `--help`, so it imports nothing slow: each command imports torch and transformers itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table

try:
    from typer import TyperException
except ImportError:  # until typer 0.27 they are those of click
    from click import ClickException as TyperException  # type: ignore[assignment]

from not_hf.errors import NotHFError, interval, one_line, printable
from not_hf.version import __version__

app = typer.Typer(name="not-hf", no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

CHECKPOINTS = "checkpoints"  # subfolder of the output folder that holds an unfinished training
SWEEP = "sweep.json"  # file in the output folder that holds a sweep, finished or not

_FLAGS = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else.")],
    "debug": Annotated[bool, typer.Option("--debug", envvar="NOT_HF_DEBUG", help="Show the traceback of a failure.")],
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"not_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Cut layers out of a causal LM, train them, share them and transplant them (arXiv 2601.13580)."""


@dataclass(frozen=True)
class Result:
    """The result of a command: as data for `--json`, as shown to people, and the reason if it counts as a failure."""

    data: dict[str, Any]
    view: str | RenderableType
    failure: str | None = None


def command(example: str, name: str | None = None) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Make a function that returns a `Result` a command of `app`, with `--json` and `--debug`.

    Args:
        example: A command line for `--help`.
        name: Of the command; `None`: the function's.
    """

    def register(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **arguments: Any) -> None:
            with failing_in_one_line(debug), contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
                result = function(**arguments)
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
def failing_in_one_line(debug: bool) -> Iterator[None]:
    """Turn any failure inside the block into one line on stderr and exit status 1, unless debugging."""
    try:
        yield
    except (typer.Exit, typer.Abort, TyperException):
        raise
    except Exception as error:
        if debug:
            raise
        end_progress_bars()
        typer.echo(f"error: {printable(_message(error))}", err=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def output_folder(folder: Path, force: bool, can_resume: bool = False) -> Iterator[None]:
    """Refuse a folder that is not empty, unless forced; delete a new folder if the block fails.

    A new folder is kept if it holds checkpoints or a sweep to resume from; `can_resume`: the command trains, and has
    `--resume` for that.
    """
    existed = folder.exists()
    if folder.is_file():
        raise NotHFError(f"{folder} is a file; choose another --output")
    if existed and not force and can_resume and _has_checkpoints(folder):
        raise NotHFError(
            f"{folder} holds an unfinished training; continue it with --resume, choose another --output, "
            "or start over with --force, which deletes its checkpoints"
        )
    if existed and any(folder.iterdir()) and not force:
        raise NotHFError(f"{folder} is not empty; choose another --output, or overwrite it with --force")
    try:
        yield
    except BaseException:
        if not existed and not _has_checkpoints(folder) and not (folder / SWEEP).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _has_checkpoints(folder: Path) -> bool:
    return any(folder.glob(f"{CHECKPOINTS}/checkpoint-*"))


def facts(title: str, rows: dict[str, Any]) -> Table:
    """Make a table of names and values, without those that are `None`."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, interval(value) if name == "layers" and isinstance(value, list) else _text(value))
    return table


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        text = json.dumps(_finite(result.data), indent=2, allow_nan=False, ensure_ascii=False)
        typer.echo(printable(text))  # escaped as in JSON, of which it is a part
    elif isinstance(result.view, str):
        typer.echo(printable(result.view))
    else:
        # a pipe has no width: do not wrap lines that go into it
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
        console.print(_Printable(result.view))
    if result.failure:
        typer.echo(f"error: {printable(result.failure)}", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Printable:
    """A view without control characters but those of the console itself, which are segments of their own."""

    view: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.view, options):
            yield Segment(text if control else printable(text), style, control)


def _finite(value: Any) -> Any:
    """Replace infinity and NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def end_progress_bars() -> None:
    """Close unfinished progress bars, so that what follows starts on a new line."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


@contextlib.contextmanager
def saying_how_to_resume(lines: Callable[[], Iterable[str]]) -> Iterator[None]:
    """On Ctrl-C in the block, say what was saved and how to go on, in these lines; the exit code is 130."""
    try:
        yield
    except KeyboardInterrupt:
        end_progress_bars()
        for line in lines():
            typer.echo(line, err=True)
        raise typer.Exit(130) from None


def _message(error: Exception) -> str:
    message, name = one_line(error), type(error).__name__
    is_explained = isinstance(error, OSError | ValueError) and message != name
    return message if is_explained else f"{name}: {message} (--debug shows where)"
