"""Writing a donor's folder: all of it or nothing, and nothing stays that a later load would prefer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from transformers.utils import CONFIG_NAME

from not_hf.config import DonorConfig
from not_hf.errors import NotHFError

# Begins the name of the folder that is written first; Trainer does not upload what begins with _
DRAFT = "_draft-"
# the files of one checkpoint; group 1 or 3 is its variant
_WEIGHTS = re.compile(r"model(\.\w+)?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(\.\w+)?\.json")


@contextlib.contextmanager
def replacing(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Write into a draft; its files take their places in `folder` when the block is through.

    What fails leaves `folder` as it was. Weights of an earlier save that the new ones do not overwrite are removed.

    Args:
        folder: Of a donor; created when missing.

    Yields:
        The draft's folder, empty.
    """
    _require_room(Path(folder), "any")
    existed = os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        # beside its destination, so that files need only be renamed
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=folder) as draft:
            yield draft
            _move(Path(draft), Path(folder))
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # something else was put there meanwhile
                os.rmdir(folder)
        raise


def stale_weights(present: Iterable[str], written: Iterable[str]) -> list[str]:
    """The weights that a load could take for those of a donor that was just written.

    A load prefers `model.safetensors` to shards, so that of an earlier save must not stay beside new shards. Other
    files, other folders and other variants are none of ours.

    Args:
        present: Files that were there before, as paths from the repo's root.
        written: Files that were written, likewise.
    """
    new = set(written)
    checkpoints = {_checkpoint(path) for path in new} - {None}
    with_weights = {folder for folder, _ in filter(None, checkpoints)}
    # a composition has its weights in subfolders: those beside its config are of a single organ that was there before
    configs = {_split(path)[0] for path in new if _split(path)[1] == CONFIG_NAME}
    checkpoints |= {(folder, None) for folder in configs - with_weights}
    return sorted(path for path in set(present) - new if _checkpoint(path) in checkpoints)


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """All files below a folder, as paths from it with `/` between their parts."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def require_donor_folder(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Refuse to save over another model: both kinds of repo use the same file names.

    Args:
        folder: Where a donor is going to be saved.
        name: What to call it in the error; `None`: by its path.

    Raises:
        NotHFError: It holds the config of something else.
    """
    config = Path(folder, CONFIG_NAME)
    if not config.is_file():
        return
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        return  # no model's
    if model_type != DonorConfig.model_type:
        raise NotHFError(
            f"{name or folder} holds a model of type {model_type!r}, which an organ would overwrite; choose another"
        )


def _move(draft: Path, folder: Path) -> None:
    """Put the draft's files in place. What fails, an interruption too, puts back what was there.

    Configs go first and come last: a process that is killed in between leaves a folder that no longer loads, and the
    old files in a folder beside, but never an organ with the weights of another.
    """
    written = sorted(files_in(draft), key=_is_config)
    for path in written:
        _require_room(folder, path)
    places = {(folder / path).parent for path in written}
    new_folders = sorted((place for place in places if not place.exists()), reverse=True)  # the inner ones first
    present = [file for place in places if place.is_dir() for file in place.iterdir() if file.is_file()]
    stale = stale_weights((file.relative_to(folder).as_posix() for file in present), written)
    replaced = [path for path in (*reversed(written), *stale) if (folder / path).exists()]
    with tempfile.TemporaryDirectory(prefix=DRAFT, dir=folder) as aside:
        moves = [(folder / path, Path(aside, path)) for path in replaced]
        moves += [(draft / path, folder / path) for path in written]
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                done.append((source, target))
                os.replace(source, target)
        except BaseException:
            for source, target in reversed(done):
                if not source.exists():
                    os.replace(target, source)
            for place in filter(Path.exists, new_folders):
                place.rmdir()
            raise


def _is_config(path: str) -> bool:
    return _split(path)[1] == CONFIG_NAME


def _require_room(folder: Path, path: str) -> None:
    """Refuse to put a file where a folder is, or a folder where a file is."""
    if (folder / path).is_dir():
        raise NotHFError(f"{folder / path} is a folder, where a file is to be written; choose another folder")
    for parent in PurePosixPath(path).parents:
        if (folder / parent).exists() and not (folder / parent).is_dir():
            raise NotHFError(f"{folder / parent} is a file, where a folder is to be written; choose another folder")


def _split(path: str) -> tuple[str, str]:
    return str(PurePosixPath(path).parent), PurePosixPath(path).name


def _checkpoint(path: str) -> tuple[str, str | None] | None:
    """Folder and variant of the checkpoint that a file belongs to; `None` for another kind of file."""
    folder, name = _split(path)
    match = _WEIGHTS.fullmatch(name)
    return None if match is None else (folder, match[1] or match[3])
