"""Writing a donor's folder atomically, without stale weights that a later load would prefer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from not_hf.config import DELTA, DonorConfig
from not_hf.errors import NotHFError, one_line
from not_hf.hub.folder_lock import locked

# Prefix of the temporary folders; Trainer does not upload names that begin with _
DRAFT = "_not_hf-draft-"
# Prefix of those with the files that are being replaced
_REPLACED = f"{DRAFT}replaced-"
# Names of weight files; group 1 or 3 is the variant
_WEIGHTS = re.compile(r"model(\.\w+)?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(\.\w+)?\.json")


@contextlib.contextmanager
def full_disk_is_oserror(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise `OSError` where safetensors raises an error of its own kind, since it cannot write a file of `folder`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {one_line(error, 200)}; free space, save again") from error


@contextlib.contextmanager
def replacing(
    folder: str | os.PathLike[str], is_main_process: bool = True, stale: Collection[str] = ()
) -> Iterator[str]:
    """Write into a temporary folder, whose files move into `folder` when the block ends.

    If the block or the move fails, `folder` stays as it was. Weights of an earlier save that the new files do not
    overwrite are removed. What a killed save left is put back or removed first. Other saves into `folder` wait.

    Args:
        folder: The donor's folder; created if missing.
        is_main_process: Whether this process writes. What others write is discarded; they do not wait.
        stale: Names of other files of an earlier save that are removed unless they are written.

    Yields:
        Path of the temporary folder, which is empty.
    """
    if not is_main_process:
        with tempfile.TemporaryDirectory() as discarded:
            yield discarded
        return
    _require_room(Path(folder), "any")
    existed = os.path.isdir(folder)
    try:
        with locked(folder) as is_locked:
            if is_locked:  # so no other save is under way
                _clear_up(Path(folder))
            # inside its destination, so that files need only be renamed
            # on Windows a file that a program has open stays, and the next save deletes it
            with tempfile.TemporaryDirectory(prefix=DRAFT, dir=folder, ignore_cleanup_errors=True) as draft:
                yield draft
                _move(Path(draft), Path(folder), stale)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # not empty: somebody else has written to it
                os.rmdir(folder)
        raise


def stale_weights(present: Iterable[str], written: Iterable[str]) -> list[str]:
    """Weight files of an earlier save that a load could take for those of the donor just written.

    A load prefers `model.safetensors` to shards, so an old one must not stay beside new shards. Other files, folders
    and variants are left alone.

    Args:
        present: Files that were there before, as paths from the repo's root.
        written: Files that were written, as paths from the repo's root.
    """
    new = set(written)
    checkpoints = {_checkpoint(path) for path in new} - {None}
    with_weights = {folder for folder, _ in filter(None, checkpoints)}
    # a composition has its weights in subfolders; weights beside its config belong to a single organ saved earlier
    configs = {_split(path)[0] for path in new if _split(path)[1] == CONFIG_NAME}
    checkpoints |= {(folder, None) for folder in configs - with_weights}
    return sorted(path for path in set(present) - new if _checkpoint(path) in checkpoints)


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """All files below a folder, as paths from it with `/` between their parts."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def require_donor_folder(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Refuse to overwrite a model that is not a donor: both kinds of repo use the same file names.

    Args:
        folder: Where a donor will be saved.
        name: What to call the folder in the error; `None`: its path.

    Raises:
        NotHFError: The folder holds another kind of model.
    """
    kind = _kind_of_model(folder)
    if kind not in ("", DonorConfig.model_type):
        raise NotHFError(
            f"{name or folder} holds a model of type {kind!r}, which a donor would overwrite; choose another"
        )


def require_no_donor(folder: str | os.PathLike[str]) -> None:
    """Refuse to overwrite a donor or composition by a merged model.

    Raises:
        NotHFError: The folder holds a donor.
    """
    if _kind_of_model(folder) == DonorConfig.model_type:
        raise NotHFError(f"{folder} holds a donor, which the merged model would overwrite; choose another folder")


def _kind_of_model(folder: str | os.PathLike[str]) -> str | None:
    """Return the `model_type` in a folder's config, which may lack it; `""` if the folder holds no model."""
    config = Path(folder, CONFIG_NAME)
    if not config.is_file():
        return ""
    try:
        kind: str | None = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        return ""  # not the config of a model
    return kind


def _move(draft: Path, folder: Path, also_stale: Collection[str]) -> None:
    """Move the draft's files into `folder`. After an error, or an interruption, the old files are back.

    If putting them back fails too, they are left for `_clear_up`.

    Old configs are the first to leave and new ones the last to arrive, that of the folder itself outermost: a process
    that is killed in between leaves a folder that does not load, with the old files in a subfolder, but never the
    config of one organ with the weights of another. Readers rely on it too, see `consistent_read`.
    """
    written = sorted(files_in(draft), key=_rank)
    for path in written:
        _require_room(folder, path)
    places = {(folder / path).parent for path in written}
    new_folders = sorted((place for place in places if not place.exists()), reverse=True)  # the inner ones first
    present = [file for place in places if place.is_dir() for file in place.iterdir() if file.is_file()]
    stale = stale_weights((file.relative_to(folder).as_posix() for file in present), written)
    stale += [name for name in also_stale if name not in written]
    replaced = [path for path in (*reversed(written), *stale) if (folder / path).exists()]
    aside = Path(tempfile.mkdtemp(prefix=_REPLACED, dir=folder))  # outlives an undo that fails
    moves = [(folder / path, aside / path) for path in replaced]
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
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _clear_up(folder: Path) -> None:
    """Remove the temporary folders of killed saves, after the files that one of them was replacing are back."""
    for replaced in folder.glob(f"{_REPLACED}*"):
        if not (folder / CONFIG_NAME).exists():  # the last to arrive
            for path in sorted(files_in(replaced), key=_rank):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(replaced / path, folder / path)
    for draft in folder.glob(f"{DRAFT}*"):
        shutil.rmtree(draft, ignore_errors=True)


def _rank(path: str) -> tuple[bool, bool]:
    """Sort configs after other files, and the config of the folder itself last."""
    return _split(path)[1] == CONFIG_NAME, path == CONFIG_NAME


def _require_room(folder: Path, path: str) -> None:
    """Refuse to write a file where a folder is, a folder where a file is, or through a link to another folder."""
    if (folder / path).is_dir():
        raise NotHFError(f"{folder / path} is a folder, where a file is to be written; choose another folder")
    for parent in PurePosixPath(path).parents:
        if parent.parts and (folder / parent).is_symlink():
            raise NotHFError(
                f"{folder / parent} is a link, and its target would be written to; remove it, or choose another folder"
            )
        if (folder / parent).exists() and not (folder / parent).is_dir():
            raise NotHFError(f"{folder / parent} is a file, where a folder is to be written; choose another folder")


def _split(path: str) -> tuple[str, str]:
    return str(PurePosixPath(path).parent), PurePosixPath(path).name


def _checkpoint(path: str) -> tuple[str, str | None] | None:
    """Folder and variant of the checkpoint that a file belongs to; `None` if it is not a weight file.

    A delta stands in the place of a whole checkpoint, so it counts as one.
    """
    folder, name = _split(path)
    match = _WEIGHTS.fullmatch(name)
    if match is None:
        return None
    variant = match[1] or match[3]
    return folder, None if variant == f".{DELTA}" else variant
