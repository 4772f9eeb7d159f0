"""The table of modules in docs/architecture.md is complete, and imports go in its direction only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FREE = {"__init__", "__main__"}


def table() -> list[str]:
    """Names of modules in the order of the table."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text.partition("## Modules")[2].partition("\n## ")[0], re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def imported(path: Path) -> Iterator[str]:
    """Modules of not_hf that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("not_hf"):
            yield (node.module or "").removeprefix("not_hf").strip(".").partition(".")[0]


def test_the_table_names_every_module():
    files = {path.stem for path in (ROOT / "not_hf").glob("*.py")} | {"cli"}
    names = table()
    assert set(names) == files - FREE and len(names) == len(set(names))


def test_imports_go_one_way():
    place = {name: n for n, name in enumerate(table())}
    upwards = [
        f"{path.stem} imports {name}"
        for path in (ROOT / "not_hf").glob("*.py")
        if path.stem not in FREE
        for name in imported(path)
        if place[name] >= place[path.stem]
    ]
    assert upwards == []
