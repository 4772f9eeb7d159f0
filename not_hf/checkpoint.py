"""Reading safetensors checkpoints lazily, from a local folder or the Hub."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import (
    is_offline_mode,
    parse_local_safetensors_file_metadata,
    parse_safetensors_file_metadata,
)
from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from not_hf.errors import CorruptDonorError

# safetensors names of the dtypes a trained weight may have, and what torch calls them
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_checkpoint(
    source: str | os.PathLike[str],
    wanted: Callable[[str], bool] = lambda name: True,
    variant: str | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Open the tensors of a checkpoint without reading them.

    Args:
        source: Local folder or Hub ID holding `model.safetensors` or a sharded checkpoint with its index.
        wanted: Says by name which tensors are needed; of a sharded checkpoint only their files are fetched.
        variant: As in transformers: `model.<variant>.safetensors`.
        hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

    Returns:
        A `safe_open(...).get_slice` view per wanted tensor, by its name in the file. A view is read from the memory
        map when it is indexed.

    Raises:
        OSError: There is no safetensors checkpoint, or it cannot be fetched.
        CorruptDonorError: A file is truncated, or the index names a file or tensor that is not there.
    """
    found = _find(source, variant, **hub_kwargs)
    if not isinstance(found, dict):
        return {name: view for name, view in _open(found).items() if wanted(name)}
    files = {name: file for name, file in found.items() if wanted(name)}
    views: dict[str, Any] = {}
    for file in sorted(set(files.values())):
        path = _fetch(source, file, **hub_kwargs)
        if path is None:
            raise CorruptDonorError(f"{source}: the weight index names {file}, which is not there")
        opened = _open(path)
        for name in (name for name, home in files.items() if home == file):
            if name not in opened:
                raise CorruptDonorError(f"{source}: the weight index puts {name} into {file}, which lacks it")
            views[name] = opened[name]
    return views


def checkpoint_files(source: str | os.PathLike[str], **hub_kwargs: Any) -> dict[str, str]:
    """Paths of a checkpoint's files on this machine by name, its index included. From the Hub all are fetched.

    Raises:
        OSError: As in `open_checkpoint`.
        CorruptDonorError: The index cannot be read.
    """
    found = _find(source, **hub_kwargs)
    names = {SAFE_WEIGHTS_INDEX_NAME, *found.values()} if isinstance(found, dict) else {SAFE_WEIGHTS_NAME}
    return {name: path for name in sorted(names) if (path := _fetch(source, name, **hub_kwargs))}


def checkpoint_size(source: str | os.PathLike[str], **hub_kwargs: Any) -> tuple[int, int]:
    """Number of parameters in a checkpoint, and its size in bytes. Of files on the Hub only the headers are read.

    Raises:
        OSError: There is no safetensors checkpoint, or it cannot be reached.
        CorruptDonorError: A header cannot be read.
    """
    try:
        if os.path.isdir(source) or hub_kwargs.get("local_files_only") or is_offline_mode():
            paths = checkpoint_files(source, **hub_kwargs).values()
            headers = [parse_local_safetensors_file_metadata(path) for path in paths if path.endswith(".safetensors")]
        else:
            headers = _remote_headers(os.fspath(source), **hub_kwargs)
    except SafetensorsParsingError as error:
        raise CorruptDonorError(f"{source}: {' '.join(str(error).split())[:300]}") from error
    tensors = [tensor for header in headers for tensor in header.tensors.values()]
    size = sum(tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors)
    return sum(tensor.parameter_count for tensor in tensors), size


def _remote_headers(
    source: str, revision: str | None = None, subfolder: str = "", token: bool | str | None = None, **hub_kwargs: Any
) -> list[SafetensorsFileMetadata]:
    """The headers of a checkpoint's files on the Hub."""

    def header(file: str) -> SafetensorsFileMetadata:
        return parse_safetensors_file_metadata(source, posixpath.join(subfolder, file), revision=revision, token=token)

    try:
        return [header(SAFE_WEIGHTS_NAME)]
    except EntryNotFoundError:
        found = _find(source, revision=revision, subfolder=subfolder, token=token, **hub_kwargs)
        return [header(file) for file in sorted(set(found.values()))] if isinstance(found, dict) else []


def renumber_layers(
    views: Mapping[str, Any], prefix: str, path: str, span: tuple[int, int]
) -> tuple[dict[str, Any], set[int]]:
    """Keep the tensors of layers `i … j - 1` and number them from 0.

    Args:
        views: Tensors by their name in the checkpoint.
        prefix: The base model's prefix in a causal LM (`model`, `transformer`), which a checkpoint may leave out.
        path: Path of the stack below the base model (`layers`, `h`, `decoder.layers`).
        span: Half-open `(i, j)`.

    Returns:
        Tensors by name below the base model (`layers.0.…`), and which layers of the span have any.
    """
    pattern = layer_pattern(prefix, path)
    kept: dict[str, Any] = {}
    seen: set[int] = set()
    for name, view in views.items():
        if (match := pattern.match(name)) and span[0] <= (n := int(match[1])) < span[1]:
            kept[f"{path}.{n - span[0]}.{match[2]}"] = view
            seen.add(n)
    return kept, seen


def layer_pattern(prefix: str, path: str) -> re.Pattern[str]:
    """Matches names of layer tensors; group 1 is the layer's number, group 2 the name below it."""
    return re.compile(rf"^(?:{re.escape(prefix)}\.)?{re.escape(path)}\.(\d+)\.(.+)$")


def _find(source: str | os.PathLike[str], variant: str | None = None, **hub_kwargs: Any) -> str | dict[str, str]:
    """The path of a checkpoint's one file, or of a sharded one the file of each tensor, as its index says."""
    whole, sharded = (_add_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if (single := _fetch(source, whole, **hub_kwargs)) is not None:
        return single
    if (index := _fetch(source, sharded, **hub_kwargs)) is not None:
        return _weight_map(index)
    raise OSError(
        f"{source} has no {whole} or {sharded}. If it holds pytorch_model.bin, "
        "convert it first: AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)"
    )


def _add_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, _, ending = name.partition(".safetensors")
    return f"{stem}.safetensors.index.{variant}.json" if ending else f"{stem}.{variant}.safetensors"


def _fetch(source: str | os.PathLike[str], file: str, **hub_kwargs: Any) -> str | None:
    return cached_file(source, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def _open(path: str) -> dict[str, Any]:
    try:
        handle = safe_open(path, framework="pt")
        return {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (a handle is no dict)
    except SafetensorError as error:
        raise CorruptDonorError(f"{path} is not a whole safetensors file: {error}") from error


def _weight_map(index: str) -> dict[str, str]:
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CorruptDonorError(f"{index} is not a safetensors index: {error}") from error
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())):
        raise CorruptDonorError(f"{index} is not a safetensors index: weight_map must map names to files")
    outside = sorted(file for file in set(weight_map.values()) if file != os.path.basename(file) or "\\" in file)
    if outside:
        raise CorruptDonorError(f"{index} names files that are not beside it: {', '.join(outside)}")
    return weight_map
