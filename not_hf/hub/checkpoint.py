"""Reading safetensors checkpoints lazily, from a local folder or the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from not_hf.architecture.upstream import fetch_file
from not_hf.errors import CorruptDonorError
from not_hf.hub.headers import read_header

# The dtypes that trained weights may have: safetensors' names, and torch's
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The dtypes that a file may hold
DTYPES = FLOAT_DTYPES | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
DTYPES |= {
    f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
DTYPES |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64", "BOOL": "bool"}


@dataclass(frozen=True)
class View:
    """A tensor in a safetensors file, memory-mapped when it is indexed, as slices of `safe_open` are.

    Each view has a memory map of its own. With one map per file, every tensor that is kept would hold on to the memory
    of those that were only read to be converted (the experts of a Mixtral, which transformers fuses into one tensor).
    """

    path: str
    identity: tuple[int, ...]  # of the file when its header was read
    dtype: str  # as safetensors calls it
    shape: list[int]
    start: int  # in bytes from the file's beginning
    end: int

    def get_dtype(self) -> str:
        """As in `safe_open(...).get_slice`; transformers calls it on lazy tensors that it dequantizes."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """As in `safe_open(...).get_slice`."""
        return self.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self.dtype not in DTYPES:
            raise CorruptDonorError(f"{self.path} holds a tensor of dtype {self.dtype}, which cannot be read here")
        dtype = getattr(torch, DTYPES[self.dtype])
        if self.start == self.end:
            return torch.empty(self.shape, dtype=dtype)[index]
        if _identity(self.path) != self.identity:
            raise CorruptDonorError(f"{self.path} was written to while it was read; try again")
        # copy-on-write, and it keeps no file open
        mapped = torch.from_file(self.path, shared=False, size=self.end, dtype=torch.uint8).untyped_storage()
        own = mapped[self.start :]  # saving in shards counts the size of the storage
        if self.start % dtype.itemsize:  # such files exist, and torch refuses such views
            own = own.clone()
        return torch.empty(0, dtype=dtype, device="cpu").set_(own).reshape(self.shape)[index]


Handle = TypeVar("Handle")  # a local path, or a file on the Hub


def open_checkpoint(
    source: str | os.PathLike[str],
    wanted: Callable[[str], bool] = lambda name: True,
    variant: str | None = None,
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Open the tensors of a checkpoint without reading them.

    Args:
        source: Local folder or Hub ID holding `model.safetensors` or a sharded checkpoint with its index.
        wanted: Tells by name which tensors are needed; of a sharded checkpoint only the files with them are fetched.
        variant: As in transformers: `model.<variant>.safetensors`.
        hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

    Returns:
        A view per wanted tensor, by its name in the file.

    Raises:
        OSError: There is no safetensors checkpoint, or it cannot be fetched.
        CorruptDonorError: A file is truncated, or the index names a file or tensor that is not there.
    """

    def find(file: str) -> str | None:
        return fetch_file(source, file, **hub_kwargs)

    return dict(choose(source, wanted, find, open_file, variant, **hub_kwargs))


def checkpoint_files(source: str | os.PathLike[str], **hub_kwargs: Any) -> dict[str, str]:
    """Paths of a checkpoint's files on this machine by name, its index included. From the Hub all are fetched.

    Raises:
        OSError: As in `open_checkpoint`.
        CorruptDonorError: The index cannot be read.
    """
    paths: dict[str, str] = {}

    def find(file: str) -> str | None:
        if path := fetch_file(source, file, **hub_kwargs):
            paths[file] = path
        return path

    for _ in choose(source, lambda name: True, find, open_file, **hub_kwargs):
        pass
    if SAFE_WEIGHTS_NAME not in paths:
        find(SAFE_WEIGHTS_INDEX_NAME)
    return paths


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

    Raises:
        CorruptDonorError: The checkpoint holds a tensor twice.
    """
    pattern = layer_pattern(prefix, path)
    kept: dict[str, Any] = {}
    seen: set[int] = set()
    for name, view in views.items():
        if (match := pattern.match(name)) and span[0] <= (n := int(match[1])) < span[1]:
            new = f"{path}.{n - span[0]}.{match[2]}"
            if new in kept:
                raise CorruptDonorError(f"the checkpoint holds {name} twice, with and without {prefix!r} before it")
            kept[new] = view
            seen.add(n)
    return kept, seen


def layer_pattern(prefix: str, path: str) -> re.Pattern[str]:
    """Matches names of layer tensors; group 1 is the layer's number, group 2 the name below it."""
    return re.compile(rf"^(?:{re.escape(prefix)}\.)?{re.escape(path)}\.(\d+)\.(.+)$")


def choose(
    source: str | os.PathLike[str],
    wanted: Callable[[str], bool],
    find: Callable[[str], Handle | None],
    read: Callable[[Handle], Mapping[str, Any]],
    variant: str | None = None,
    **hub_kwargs: Any,
) -> Iterator[tuple[str, Any]]:
    """The wanted tensors of a checkpoint, which is one file or several with an index.

    Args:
        find: Finds a file by its name; `None` if there is none.
        read: Gives the tensors in a file, by name.
    """
    whole, sharded = (_add_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if (single := find(whole)) is not None:
        yield from ((name, tensor) for name, tensor in read(single).items() if wanted(name))
        return
    index = fetch_file(source, sharded, **hub_kwargs)
    if index is None:
        _require_reach(source, whole, **hub_kwargs)
        raise OSError(
            f"{source} has no {whole} or {sharded}. If it holds pytorch_model.bin, "
            "convert it first: AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)"
        )
    files = {name: file for name, file in read_weight_map(index).items() if wanted(name)}
    for file in sorted(set(files.values())):
        if (handle := find(file)) is None:
            _require_reach(source, file, **hub_kwargs)
            raise CorruptDonorError(f"{source}: the weight index names {file}, which is not there")
        tensors = read(handle)
        for name in (name for name, home in files.items() if home == file):
            if name not in tensors:
                raise CorruptDonorError(f"{source}: the weight index puts {name} into {file}, which lacks it")
            yield name, tensors[name]


def _add_variant(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    stem, _, ending = name.partition(".safetensors")
    return f"{stem}.safetensors.index.{variant}.json" if ending else f"{stem}.{variant}.safetensors"


def _require_reach(source: str | os.PathLike[str], file: str, **hub_kwargs: Any) -> None:
    """Raise `OSError` if a file was not found only because the Hub could not be asked for it."""
    try:
        found = cached_file(source, file, **hub_kwargs)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise OSError(
                f"{source}: {file} is not in the cache, and the Hub was not to be asked or did not answer; "
                "load it once while online"
            ) from error
        return  # it was asked, and there is none
    if found is not None:
        raise OSError(f"{source}: {file} could not be fetched a moment ago; try again")


def open_file(path: str) -> dict[str, Any]:
    """A view of each tensor in one safetensors file, by name.

    Raises:
        CorruptDonorError: It is truncated, or not a safetensors file.
    """
    identity = _identity(path)
    header = read_header(path)
    return {name: View(path, identity, info.dtype, info.shape, *info.data_offsets) for name, info in header.items()}


def _identity(path: str) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_weight_map(index: str) -> dict[str, str]:
    """Which file holds which tensor, from the index of a sharded checkpoint.

    Raises:
        CorruptDonorError: It is not an index, or names files in other folders.
    """
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CorruptDonorError(f"{index} is not a safetensors index: {error}") from error
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(f, str) for f in weight_map.values())):
        raise CorruptDonorError(f"{index} is not a safetensors index: weight_map must map names to files")
    outside = sorted(
        file
        for file in set(weight_map.values())
        if file != os.path.basename(file) or "\\" in file or not file.endswith(".safetensors")
    )
    if outside:
        raise CorruptDonorError(f"{index} names files that are not beside it, or no safetensors: {', '.join(outside)}")
    return weight_map
