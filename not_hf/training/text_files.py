"""Which files a source of text names, and what reads them."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder

from not_hf.errors import NotHFError

logger = logging.getLogger(__name__)

# suffix -> builder of `datasets`; it would not read .md as text by itself
_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def warn_of_files_left_out(folder: str, name: str | None) -> None:
    """Warn of the text files of a folder that `datasets` puts into no split: beside others named after one, mostly."""
    splits: Any = load_dataset_builder(folder, name).config.data_files or {}
    used = {os.path.realpath(file) for files in splits.values() for file in files}
    found = [path for path in _texts_in(folder) if not path.name.startswith(".")]
    if left := [str(path) for path in found if os.path.realpath(path) not in used]:
        logger.warning(
            "%d of %d text files in %s are left out, first %s: datasets reads files of one kind, and if some are "
            "named after a split, those only; choose by a glob, such as %s/*%s",
            *(len(left), len(found), folder, left[0], folder, Path(left[0]).suffix),
        )


def _texts_in(folder: str) -> list[Path]:
    return [p for p in sorted(Path(folder).rglob("*")) if p.name != "README.md" and _suffix(p.name) in _BUILDERS]


def files_of(source: str) -> list[str] | None:
    """List the files of a source; `None` where `datasets` finds them itself: in a folder or a Hub dataset."""
    if "://" in source or os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        found = _texts_in(source)
        markdown = [str(p) for p in found if _suffix(p.name) == ".md"]
        if not found:
            raise NotHFError(f"no text files in {source}; expected {', '.join(_BUILDERS)}")
        if len(markdown) <= len(found) - len(markdown):
            return None
        if len(markdown) < len(found):
            raise NotHFError(f"{source} mixes .md with other files; choose by a glob, such as {source}/**/*.md")
        return markdown
    if glob.has_magic(source):
        matches = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        if not matches:
            raise FileNotFoundError(f"no file matches {source}")
        return matches
    if _suffix(source) in _BUILDERS or source.startswith((".", os.sep)) or source.count("/") > 1:
        raise FileNotFoundError(f"no file or folder {source}; a Hub dataset ID is owner/name")
    return None


def _suffix(name: str) -> str:
    """Return the suffix of a file name in lower case, ignoring that of a compression."""
    name = name.lower()
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return os.path.splitext(name)[1]


def builder_of(files: list[str]) -> str:
    """Find the one builder of `datasets` that reads all these files."""
    suffixes = {_suffix(file) for file in files}
    builders = {_BUILDERS.get(suffix) for suffix in suffixes}
    builder = builders.pop()
    if builder is None or builders:
        raise NotHFError(
            f"cannot read {', '.join(sorted(s or 'files without a suffix' for s in suffixes))} as one dataset; "
            f"use files of one kind: {', '.join(_BUILDERS)}"
        )
    return builder
