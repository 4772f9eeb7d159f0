"""Partial downloads of a checkpoint on the Hub: its headers, or the bytes of a few tensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import TensorInfo, WeakFileLock
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from not_hf.architecture.upstream import commit_of
from not_hf.errors import CorruptDonorError
from not_hf.hub import checkpoint
from not_hf.hub.checkpoint import View, open_checkpoint, open_file
from not_hf.hub.headers import BITS, read_remote_header, size_of
from not_hf.hub.ranges import Piece, RemoteFile, gather


def open_part(
    source: str | os.PathLike[str], wanted: re.Pattern[str], name: str, **hub_kwargs: Any
) -> dict[str, View]:
    """As `open_checkpoint`, but of files on the Hub only the bytes of the wanted tensors are fetched.

    They are kept in the assets cache of `huggingface_hub`, by repo and commit, and not fetched again. Files that the
    Hub cache holds already are read there.

    Args:
        source: Local folder or Hub ID.
        wanted: Matches the names of the tensors that are needed.
        name: What to call this choice of tensors in the cache.
        hub_kwargs: As in `open_checkpoint`; a `revision` that is resolved to its commit costs no request.

    Raises:
        OSError: As in `open_checkpoint`, or a range of a file cannot be read.
        CorruptDonorError: As in `open_checkpoint`.
    """
    if os.path.isdir(source):
        return open_checkpoint(source, wanted, **hub_kwargs)
    repo = os.fspath(source)
    commit = commit_of(hub_kwargs.get("revision"))
    fresh = hub_kwargs.get("force_download", False)
    offline = hub_kwargs.get("local_files_only", False) or is_offline_mode()
    if commit and not fresh:
        part = _part_file(repo, commit, name, hub_kwargs)
        if part.exists():
            try:
                return open_file(str(part))
            except CorruptDonorError:  # damaged on disk
                if offline:
                    raise
                fresh = True
        elif _is_cached(repo, wanted, commit, hub_kwargs):
            return open_checkpoint(source, wanted, **{**hub_kwargs, "local_files_only": True})
    if offline:
        raise OSError(f"neither {name} of {repo} nor its files are in the cache; go online once")

    located = _locate(repo, wanted, **hub_kwargs)
    if not located:
        return {}
    part = _part_file(repo, next(file.commit for file, _ in located.values()), name, hub_kwargs)
    part.parent.mkdir(parents=True, exist_ok=True)
    prefix, pieces = _assemble(located)
    gather(pieces, prefix, part, f"{repo} {name}", fresh)
    return open_file(str(part))


@contextlib.contextmanager
def borrow_part(source: str | os.PathLike[str], names: Iterable[str], **hub_kwargs: Any) -> Iterator[dict[str, View]]:
    """Open tensors of these names as `open_part` does, but keep nothing that was fetched after the block.

    What an interruption leaves is kept, so that the next call goes on where it was. Processes that borrow the same
    tensors wait for each other.
    """
    ordered = sorted(names)
    wanted = re.compile(rf"(?:{'|'.join(map(re.escape, ordered))})\Z")
    name = f"tensors-{hashlib.sha256(repr(ordered).encode()).hexdigest()[:16]}"
    commit = commit_of(hub_kwargs.get("revision"))
    if commit is None or os.path.isdir(source):
        yield open_part(source, wanted, name, **hub_kwargs)
        return
    part = _part_file(os.fspath(source), commit, name, hub_kwargs)
    part.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(part.with_name(f"{part.name}.borrowed")):
        yield open_part(source, wanted, name, **hub_kwargs)
        part.unlink(missing_ok=True)


def list_tensors(
    source: str | os.PathLike[str],
    variant: str | None = None,
    wanted: re.Pattern[str] = checkpoint.EVERY,
    **hub_kwargs: Any,
) -> dict[str, TensorInfo]:
    """Name, dtype, shape and size of the wanted tensors of a checkpoint, from the headers of its files alone.

    Raises:
        OSError: There is no safetensors checkpoint, or it cannot be reached.
        CorruptDonorError: A header cannot be read.
    """
    if os.path.isdir(source) or hub_kwargs.get("local_files_only", False) or is_offline_mode():
        views = open_checkpoint(source, wanted, variant, **hub_kwargs)
        return {
            name: TensorInfo(dtype=cast(Any, view.dtype), shape=view.shape, data_offsets=view.data_offsets)
            for name, view in views.items()
        }
    return {name: info for name, (_, info) in _locate(os.fspath(source), wanted, variant, **hub_kwargs).items()}


def list_part(
    source: str | os.PathLike[str], wanted: re.Pattern[str], name: str, **hub_kwargs: Any
) -> dict[str, TensorInfo]:
    """As `list_tensors`, but what the Hub told of a commit is kept beside the part of that name in the cache."""
    commit = commit_of(hub_kwargs.get("revision"))
    if commit is None or os.path.isdir(source):
        return list_tensors(source, wanted=wanted, **hub_kwargs)
    kept = _part_file(os.fspath(source), commit, name, hub_kwargs).with_suffix(".json")
    if kept.exists() and not hub_kwargs.get("force_download", False):
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # damaged on disk
            return {key: TensorInfo(*info) for key, info in json.loads(kept.read_text(encoding="utf-8")).items()}
    found = list_tensors(source, wanted=wanted, **hub_kwargs)
    told = {key: (info.dtype, info.shape, info.data_offsets) for key, info in found.items()}
    kept.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(kept.with_name(f"{kept.name}.lock")):
        draft = kept.with_name(f"{kept.name}.draft")
        draft.write_text(json.dumps(told), encoding="utf-8")
        draft.replace(kept)
    return found


Located = dict[str, tuple[RemoteFile, TensorInfo]]  # tensors on the Hub, each with the file that holds it


def _locate(
    repo: str, wanted: re.Pattern[str] = checkpoint.EVERY, variant: str | None = None, **hub_kwargs: Any
) -> Located:
    """The wanted tensors of a repo's checkpoint, all at one commit; only headers and the index are read."""
    if file := _find(repo, checkpoint.file_names(variant)[0], hub_kwargs):
        return checkpoint.matching(_read_header(file), wanted)
    located: Located = {}
    for shard, names in checkpoint.read_shards(repo, wanted, variant, **hub_kwargs).items():
        if (file := _find(repo, shard, hub_kwargs)) is None:
            raise checkpoint.missing_shard(repo, shard, **hub_kwargs)
        hub_kwargs["revision"] = file.commit
        located |= checkpoint.pick(_read_header(file), names, repo, shard)
    return located


def _find(repo: str, file: str, hub_kwargs: Mapping[str, Any]) -> RemoteFile | None:
    try:
        return RemoteFile.find(repo, _inner(file, hub_kwargs), hub_kwargs.get("revision"), hub_kwargs.get("token"))
    except EntryNotFoundError:
        return None


def _read_header(file: RemoteFile) -> Located:
    return {name: (file, info) for name, info in read_remote_header(file).items()}


def _inner(file: str, hub_kwargs: Mapping[str, Any]) -> str:
    """A file's path in its repo."""
    return "/".join(part for part in (hub_kwargs.get("subfolder"), file) if part)


def _part_file(repo: str, commit: str, name: str, hub_kwargs: Mapping[str, Any]) -> Path:
    """Where a part of a checkpoint is cached: in the folder for what libraries derive from files on the Hub."""
    cache, subfolder = hub_kwargs.get("cache_dir"), hub_kwargs.get("subfolder") or ""
    assets = Path(cache, "not_hf-assets") if cache else Path(constants.HF_ASSETS_CACHE, "not_hf")
    if subfolder:  # any text, of any length
        name += f"-{hashlib.sha256(subfolder.encode()).hexdigest()[:16]}"
    return assets.expanduser() / repo.replace("/", "--") / commit / f"{name}.safetensors"


def _is_cached(repo: str, wanted: re.Pattern[str], commit: str | None, hub_kwargs: Mapping[str, Any]) -> bool:
    """Whether the Hub cache holds the files of all wanted tensors, which it then does whole."""

    def path(file: str) -> str | None:
        found = try_to_load_from_cache(repo, _inner(file, hub_kwargs), hub_kwargs.get("cache_dir"), revision=commit)
        return found if isinstance(found, str) else None

    if path(SAFE_WEIGHTS_NAME):
        return True
    index = path(SAFE_WEIGHTS_INDEX_NAME)
    return index is not None and all(
        map(path, checkpoint.matching(checkpoint.read_weight_map(index), wanted).values())
    )


def _assemble(tensors: Located) -> tuple[bytes, list[Piece]]:
    """Header of a safetensors file of these tensors, and which bytes follow it."""

    def place(item: tuple[str, tuple[RemoteFile, TensorInfo]]) -> tuple[int, str, tuple[int, int]]:
        _, (file, info) = item
        return -BITS[info.dtype], file.url, info.data_offsets

    # wide dtypes first, so that every tensor is aligned; otherwise in the order of the source
    ordered = sorted(tensors.items(), key=place)
    header: dict[str, dict[str, Any]] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name, (_, info) in ordered:
        offsets[name], end = end, end + size_of(info)
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    pieces = [Piece(file, *info.data_offsets, offset=len(prefix) + offsets[name]) for name, (file, info) in ordered]
    return prefix, pieces
