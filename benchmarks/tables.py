"""Write the answers and tables that the documentation quotes, from the results files: `make bench-tables`.

Each stands between two comments with its name. A test compares what is written with what the files say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import answers
import figures
from evidence import QUESTIONS
from figures import RESULTS
from texts import ROOT

FRESH, BY_HEART, SWITCHING = (
    lambda: figures.side_by_side(figures.fresh_rows()),
    lambda: figures.side_by_side(figures.recall_rows()),
    lambda: figures.side_by_side(figures.switch_rows()),
)
PAGES: dict[Any, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"lora": figures.lora, "native": figures.native},
    ROOT / "docs" / "choosing.md": {
        "fresh": FRESH,
        "other forms": answers.other_forms,
        "on gpu": answers.on_gpu,
        "by heart": BY_HEART,
        "switching": SWITCHING,
    },
    ROOT / "docs" / "install.md": {"demo": figures.demo, "demo run": answers.demo_run},
    ROOT / "benchmarks" / "README.md": {
        "fresh answer": answers.fresh,
        "fresh": FRESH,
        "other forms": answers.other_forms,
        "on gpu": answers.on_gpu,
        "recall answer": answers.recall,
        "by heart": BY_HEART,
        "switching answer": answers.switching,
        "switching": SWITCHING,
        "native answer": answers.native,
        "native": figures.native,
        **{name: functools.partial(answers.of_paper, name) for name in QUESTIONS},
    },
    RESULTS / "train.md": {
        "train": figures.train,
        **{form: functools.partial(figures.train, form) for form in ("replay", "long", "broad")},
        "gpu": figures.gpu,
    },
    RESULTS / "recall.md": {"recall": figures.recall_table},
    RESULTS / "privacy.md": {"privacy": figures.privacy_table},
    RESULTS / "sweep.md": {"sweep": figures.sweep_table},
    **{
        RESULTS / "paper" / f"{name}.md": {name: functools.partial(answers.details_of_paper, name)}
        for name in QUESTIONS
        if (RESULTS / "paper" / f"{name}.json").exists()
    },
}


def written(page: str, parts: dict[str, Callable[[], str]]) -> str:
    """A page with its tables as the results are now."""
    for name, part in parts.items():
        block = f"\n{part()}\n"
        begin, end = (f"<!-- {mark}{name} -->" for mark in ("", "/"))
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{block}{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    for path, parts in PAGES.items():
        path.write_text(written(path.read_text("utf-8"), parts), "utf-8")
