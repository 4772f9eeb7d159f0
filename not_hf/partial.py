"""No more of a checkpoint on the Hub than is needed: its headers, or the bytes of a few tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import TensorInfo
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from not_hf.checkpoint import choose, fetch_file, open_checkpoint, open_file, read_weight_map
from not_hf.errors import CorruptDonorError
from not_hf.ranges import Piece, RemoteFile, gather

_MAX_HEADER = 100_000_000  # bytes, as in safetensors


def open_part(
    source: str | os.PathLike[str], wanted: Callable[[str], bool], name: str, **hub_kwargs: Any
) -> dict[str, Any]:
    """As `open_checkpoint`, but of files on the Hub only the bytes of the wanted tensors are fetched.

    They are kept in the assets cache of `huggingface_hub`, by repo and commit, and not fetched again. Files that the
    Hub cache holds anyway are read there.

    Args:
        source: Local folder or Hub ID.
        wanted: Says by name which tensors are needed.
        name: What to call this choice of tensors in the cache.
        hub_kwargs: As in `open_checkpoint`; a `revision` that is resolved to its commit costs no request.

    Raises:
        OSError: As in `open_checkpoint`, or a range of a file cannot be read.
        CorruptDonorError: As in `open_checkpoint`.
    """
    if os.path.isdir(source):
        return open_checkpoint(source, wanted, **hub_kwargs)
    repo, subfolder = os.fspath(source), hub_kwargs.get("subfolder") or ""
    commit = getattr(hub_kwargs.get("revision"), "resolved", None)
    fresh = hub_kwargs.get("force_download", False)
    if commit and not fresh and (part := _part_file(repo, commit, subfolder, name, hub_kwargs)).exists():
        return open_file(str(part))
    if commit and not fresh and _is_cached(repo, wanted, commit, hub_kwargs):
        return open_checkpoint(source, wanted, **{**hub_kwargs, "local_files_only": True})
    if hub_kwargs.get("local_files_only", False) or is_offline_mode():
        raise OSError(f"neither {name} of {repo} nor its files are in the cache; go online once")

    located = dict(choose(source, wanted, _remote(repo, hub_kwargs), read_header, **hub_kwargs))
    if not located:
        return {}
    commit = next(file.commit for file, _ in located.values())
    part = _part_file(repo, commit, subfolder, name, hub_kwargs)
    if fresh:
        part.unlink(missing_ok=True)
    prefix, pieces = _assemble(located)
    gather(pieces, prefix, part, f"{repo} {name}")
    try:
        return open_file(str(part))
    except CorruptDonorError:  # a header that contradicts itself
        part.unlink()
        raise


def list_tensors(
    source: str | os.PathLike[str], variant: str | None = None, **hub_kwargs: Any
) -> dict[str, TensorInfo]:
    """Name, dtype, shape and size of every tensor of a checkpoint, from the headers of its files alone.

    Raises:
        OSError: There is no safetensors checkpoint, or it cannot be reached.
        CorruptDonorError: A header cannot be read.
    """

    def find(file: str) -> str | None:
        return fetch_file(source, file, **hub_kwargs)

    def every(name: str) -> bool:
        return True

    if os.path.isdir(source) or hub_kwargs.get("local_files_only", False) or is_offline_mode():
        return dict(choose(source, every, find, _read_local_header, variant, **hub_kwargs))
    remote = _remote(os.fspath(source), hub_kwargs)
    return {name: info for name, (_, info) in choose(source, every, remote, read_header, variant, **hub_kwargs)}


def read_header(file: RemoteFile) -> dict[str, tuple[RemoteFile, TensorInfo]]:
    """The tensors of a safetensors file on the Hub, each with the file; offsets count from the file's beginning.

    Raises:
        OSError: The header cannot be read.
        CorruptDonorError: It is no safetensors header.
    """
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, file.size - 8):
        raise CorruptDonorError(f"{file.url} is not a whole safetensors file")
    return {name: (file, info) for name, info in _parse_header(file.read(8, 8 + length), file.size, file.url).items()}


def _remote(repo: str, hub_kwargs: Mapping[str, Any]) -> Callable[[str], RemoteFile | None]:
    """Finds files of a repo by name, all of them at the commit of the first."""
    revision = hub_kwargs.get("revision")

    def find(file: str) -> RemoteFile | None:
        nonlocal revision
        path = "/".join(part for part in (hub_kwargs.get("subfolder"), file) if part)
        try:
            found = RemoteFile.find(repo, path, revision, hub_kwargs.get("token"))
        except EntryNotFoundError:
            return None
        revision = found.commit
        return found

    return find


def _part_file(repo: str, commit: str, subfolder: str, name: str, hub_kwargs: Mapping[str, Any]) -> Path:
    """Where a part of a checkpoint is kept. `cached_assets_path` makes the folder."""
    cache = hub_kwargs.get("cache_dir")
    assets = Path(cache, "not_hf-assets") if cache else None
    folder = cached_assets_path("not_hf", repo, "/".join(filter(None, (commit, subfolder))), assets_dir=assets)
    return folder / f"{name}.safetensors"


def _is_cached(repo: str, wanted: Callable[[str], bool], commit: str | None, hub_kwargs: Mapping[str, Any]) -> bool:
    """Whether the Hub cache holds the files of all wanted tensors, which it then does whole."""

    def path(file: str) -> str | None:
        inner = "/".join(part for part in (hub_kwargs.get("subfolder"), file) if part)
        found = try_to_load_from_cache(repo, inner, hub_kwargs.get("cache_dir"), revision=commit)
        return found if isinstance(found, str) else None

    if path(SAFE_WEIGHTS_NAME):
        return True
    index = path(SAFE_WEIGHTS_INDEX_NAME)
    return index is not None and all(path(file) for name, file in read_weight_map(index).items() if wanted(name))


def _assemble(tensors: Mapping[str, tuple[RemoteFile, TensorInfo]]) -> tuple[bytes, list[Piece]]:
    """Header of a safetensors file of these tensors, and which bytes follow it."""
    # those of wide dtypes first, so that each begins at a multiple of its width; else in the order they are read
    ordered = sorted(
        tensors.items(), key=lambda item: (-_width(item[1][1]), item[1][0].url, item[1][1].data_offsets[0])
    )
    header: dict[str, dict[str, Any]] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name, (_, info) in ordered:
        offsets[name], end = end, end + info.data_offsets[1] - info.data_offsets[0]
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    pieces = [Piece(file, *info.data_offsets, offset=len(prefix) + offsets[name]) for name, (file, info) in ordered]
    return prefix, pieces


def _width(info: TensorInfo) -> float:
    return (info.data_offsets[1] - info.data_offsets[0]) / max(1, math.prod(info.shape))


def _parse_header(text: bytes, size: int, where: str) -> dict[str, TensorInfo]:
    """What a safetensors header says; `data_offsets` are made to count from the file's beginning."""
    first, tensors = 8 + len(text), {}
    try:
        for name, entry in json.loads(text).items():
            if name == "__metadata__":
                continue
            start, end = (first + int(offset) for offset in entry["data_offsets"])
            if not first <= start <= end <= size:
                raise ValueError(f"{name} lies outside of the file")
            tensors[name] = TensorInfo(dtype=entry["dtype"], shape=list(entry["shape"]), data_offsets=(start, end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptDonorError(f"{where} is not a whole safetensors file: {error}") from error
    return tensors


def _read_local_header(path: str) -> dict[str, TensorInfo]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _parse_header(file.read(min(length, _MAX_HEADER)), os.path.getsize(path), path)
