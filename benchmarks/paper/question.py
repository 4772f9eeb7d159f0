"""What the scripts of the paper's questions have in common: options, runs, the end of `main`, medians."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import methods  # noqa: E402 (from the folder above, like the next)
import record  # noqa: E402
from bases import BASES, folder_of  # noqa: E402
from texts import ROOT  # noqa: E402

Runs = list[dict[str, Any]]


def parser_of(script: str, description: str, forms: Iterable[str]) -> argparse.ArgumentParser:
    """The options of a script; its full form is written into `benchmarks/results/paper` unless told otherwise."""
    parser = record.parser_of(description, forms, f"{', '.join(BASES)} (smollm2)")
    parser.add_argument("--report", action="store_true", help="run nothing: answer and picture of the runs so far")
    parser.add_argument("--seeds", type=int, help="how many; as many as the form has, unless told otherwise")
    parser.set_defaults(script=script, base="smollm2")
    return parser


def size_of(options: argparse.Namespace, forms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The size of a form, with as many seeds as the options say."""
    return {**forms[options.form], **({"seeds": options.seeds} if options.seeds else {})}


def opened(options: argparse.Namespace, run_once: Callable[..., Any]) -> AbstractContextManager[Any]:
    """The record of a script, in which each run has its base and form, and the pool of its runs."""
    if options.output is None and options.form == "full":
        options.output = ROOT / "benchmarks" / "results" / "paper" / Path(options.script).with_suffix(".json").name
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    name = "smoke" if options.form == "smoke" else options.base
    about = {"base": name, "form": options.form}
    return record.opened(options.script, options, run_once, functools.partial(folder_of, name), about)


def ask(
    parser: argparse.ArgumentParser, arguments: list[str] | None, run_once: Callable[..., Any],
    run_all: Callable[[record.Record, argparse.Namespace, Any], None], report: tuple[Callable[..., Any], ...],
) -> dict[str, Any]:  # fmt: skip
    """What the `main` of a script does: one run, or all that are not there yet and the answer.

    Args:
        run_all: Makes the runs by the record, the options and the pool.
        report: The functions of `concluded`.
    """
    options = parser.parse_args(arguments)
    if record.is_one_run(options, run_once):
        return {}
    with opened(options, run_once) as (kept, pool):
        if not options.report:
            run_all(kept, options, pool)
    return concluded(kept, options, *report)


def concluded(
    kept: record.Record, options: argparse.Namespace, find: Callable[[Runs], Any],
    headline: Callable[[Any], str], details: Callable[[Any], str], draw: Callable[[Any, Path], None],
) -> dict[str, Any]:  # fmt: skip
    """Answer the question by all runs of this form, of whatever base; print the answer, and write it and the picture.

    Args:
        find: What the runs say, as JSON.
        headline: The answer in a sentence or two.
        details: Tables and the words that belong to them, as Markdown.
        draw: Writes the picture.
    """
    runs = [run for run in kept.runs.values() if run["given"]["form"] == options.form]
    if not runs:
        raise SystemExit(f"no {options.form} runs in {options.output}; leave out --report to make them")
    found = find(runs)
    words = {"answer": headline(found), "details": f"{details(found).rstrip()}\n\n{seeds_of(runs)}"}
    kept.save(form=options.form, found=found, **words)
    print(*words.values(), sep="\n\n")
    if options.output:
        draw(found, options.output.with_suffix(".png"))
    return {"found": found, **words}


def seeds_of(runs: Runs) -> str:
    """How many seeds each base was measured with, in a sentence; the search for rates does not count."""
    seeds: dict[str, set[int]] = {}
    for given in (run["given"] for run in runs):
        seeds.setdefault(given["base"], set()).add(given["seed"])
    counts = (f"{base} {len(of_base - {methods.SEARCH_SEED})}" for base, of_base in seeds.items())
    return f"Number of seeds: {', '.join(counts)}."


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, with the smallest and the largest value behind it."""
    return methods.spread(values, f".{digits}f")


def is_at_end(losses: Mapping[float, float]) -> bool:
    """Whether the best of some learning rates is the smallest or the largest of them, by the loss with each."""
    return min(losses, key=losses.__getitem__) in (min(losses), max(losses))


def percentages(shares: Sequence[float]) -> str:
    """The smallest and the largest share in percent."""
    low, high = (f"{100 * share:.0f}".replace("-", "−") for share in (min(shares), max(shares)))
    return f"{low} to {high} %"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
