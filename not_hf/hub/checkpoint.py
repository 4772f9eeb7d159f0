"""Reading safetensors checkpoints lazily, from a local folder or the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from not_hf.architecture.upstream import fetch_file
from not_hf.errors import CorruptDonorError, some
from not_hf.hub.headers import read_header
from not_hf.limits import MAX_INDEX, read_json

# The dtypes that trained weights may have: safetensors' names, and torch's
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The dtypes that a file may hold
DTYPES = FLOAT_DTYPES | {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
DTYPES |= {
    f"{sign}{bits}": f"{name}{bits}" for sign, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
DTYPES |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64", "BOOL": "bool"}

MAPS = os.name != "nt"  # Windows does not replace or delete a file that is mapped


@dataclass(frozen=True)
class View:
    """A tensor in a safetensors file, memory-mapped when it is indexed, as slices of `safe_open` are; read on Windows.

    Each view has a memory map of its own. With one map per file, every tensor that is kept would hold on to the memory
    of those that were only read to be converted (the experts of a Mixtral, which transformers fuses into one tensor).
    """

    path: str
    identity: tuple[int, ...]  # of the file when its header was read
    dtype: str  # as safetensors calls it
    shape: list[int]
    data_offsets: tuple[int, int]  # in bytes from the file's beginning

    def get_dtype(self) -> str:
        """As in `safe_open(...).get_slice`; transformers calls it on lazy tensors that it dequantizes."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """As in `safe_open(...).get_slice`."""
        return self.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self.dtype not in DTYPES:
            raise CorruptDonorError(f"{self.path} holds a tensor of dtype {self.dtype}, which cannot be read here")
        dtype = torch_dtype(self.dtype)
        start, end = self.data_offsets
        if start == end:
            return torch.empty(self.shape, dtype=dtype, device="cpu")[index]
        self._require_unchanged()
        own = self._map() if MAPS else self._read()
        self._require_unchanged()  # it is of that file
        if MAPS and start % dtype.itemsize:  # such files exist; views of them do not
            own = own.clone()
        return torch.empty(0, dtype=dtype, device="cpu").set_(own).reshape(self.shape)[index]

    def _map(self) -> torch.UntypedStorage:
        start, end = self.data_offsets
        # a private copy, page by page, of what is written to; it keeps no file open
        mapped = torch.from_file(self.path, shared=False, size=end, dtype=torch.uint8).untyped_storage()
        return mapped[start:]  # by the size of its storage a tensor weighs when it is saved in shards

    def _read(self) -> torch.UntypedStorage:
        start, end = self.data_offsets
        values = torch.empty(end - start, dtype=torch.uint8, device="cpu")
        with open(self.path, "rb") as file:
            file.seek(start)
            file.readinto(values.numpy().data)
        return values.untyped_storage()

    def chunks(self) -> Iterator[torch.Tensor]:
        """Read the values in order, as flat tensors of at most `CHUNK` bytes; nothing is mapped or kept.

        Raises:
            CorruptDonorError: The file has changed.
        """
        start, end = self.data_offsets
        with open(self.path, "rb") as file:
            file.seek(start)
            for left in range(end - start, 0, -CHUNK):
                values = bytearray(file.read(min(CHUNK, left)))
                self._require_unchanged()
                yield torch.frombuffer(values, dtype=torch_dtype(self.dtype))

    def _require_unchanged(self) -> None:
        if _identity(self.path) != self.identity:
            raise CorruptDonorError(f"{self.path} was written to while it was read; try again")


CHUNK = 8 << 20  # bytes, whole numbers of values of every dtype


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch that safetensors calls so; `KeyError` if there is none."""
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def hollow(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors like those in files, on the meta device; `KeyError` if one has a dtype that torch lacks."""
    return {
        name: torch.empty(each.shape, dtype=torch_dtype(each.dtype), device="meta") for name, each in tensors.items()
    }


EVERY = re.compile("")  # matches each name


def open_checkpoint(
    source: str | os.PathLike[str],
    wanted: re.Pattern[str] = EVERY,
    variant: str | None = None,
    **hub_kwargs: Any,
) -> dict[str, View]:
    """Open the tensors of a checkpoint without reading them.

    Args:
        source: Local folder or Hub ID holding `model.safetensors` or a sharded checkpoint with its index.
        wanted: Matches the names of the tensors that are needed; of a sharded checkpoint only their files are fetched.
        variant: As in transformers: `model.<variant>.safetensors`.
        hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, … as in transformers.

    Returns:
        A view per wanted tensor, by its name in the file.

    Raises:
        OSError: There is no safetensors checkpoint, or it cannot be fetched.
        CorruptDonorError: A file is truncated, or the index names a file or tensor that does not exist.
    """
    if path := fetch_file(source, file_names(variant)[0], **hub_kwargs):
        return matching(open_file(path), wanted)
    views: dict[str, View] = {}
    for file, names in read_shards(source, wanted, variant, **hub_kwargs).items():
        if (path := fetch_file(source, file, **hub_kwargs)) is None:
            raise missing_shard(source, file, **hub_kwargs)
        views |= pick(open_file(path), names, source, file)
    return views


def checkpoint_files(source: str | os.PathLike[str], variant: str | None = None, **hub_kwargs: Any) -> dict[str, str]:
    """Paths of a checkpoint's files on this machine by name, its index included. From the Hub all are fetched.

    Raises:
        OSError: As in `open_checkpoint`.
        CorruptDonorError: The index cannot be read.
    """
    whole, index = file_names(variant)
    names = [whole]
    if fetch_file(source, whole, **hub_kwargs) is None:
        names = [index, *read_shards(source, variant=variant, **hub_kwargs)]
    return {name: path for name in names if (path := fetch_file(source, name, **hub_kwargs))}


def read_shards(
    source: str | os.PathLike[str], wanted: re.Pattern[str] = EVERY, variant: str | None = None, **hub_kwargs: Any
) -> dict[str, list[str]]:
    """The files of a sharded checkpoint that hold wanted tensors, each with their names; only the index is read.

    Raises:
        OSError: There is no index.
        CorruptDonorError: It cannot be read.
    """
    whole, sharded = file_names(variant)
    index = fetch_file(source, sharded, **hub_kwargs)
    if index is None:
        _require_reach(source, whole, **hub_kwargs)
        raise OSError(
            f"{source} has no {whole} or {sharded}. If it holds pytorch_model.bin, "
            "convert it first: AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)"
        )
    shards: dict[str, list[str]] = {}
    for name, file in matching(read_weight_map(index), wanted).items():
        shards.setdefault(file, []).append(name)
    return dict(sorted(shards.items()))


Tensor = TypeVar("Tensor")


def matching(tensors: Mapping[str, Tensor], wanted: re.Pattern[str]) -> dict[str, Tensor]:
    """Those of `tensors` whose names match."""
    return {name: tensor for name, tensor in tensors.items() if wanted.match(name)}


def pick(
    tensors: Mapping[str, Tensor], names: Iterable[str], source: str | os.PathLike[str], file: str
) -> dict[str, Tensor]:
    """Those tensors of a file that the index of a checkpoint says it holds.

    Raises:
        CorruptDonorError: It lacks one.
    """
    for name in names:
        if name not in tensors:
            raise CorruptDonorError(f"{source}: the weight index puts {name} into {file}, which lacks it")
    return {name: tensors[name] for name in names}


def missing_shard(source: str | os.PathLike[str], file: str, **hub_kwargs: Any) -> CorruptDonorError:
    """The error for a file that a weight index names and that does not exist.

    Raises:
        OSError: The Hub could not be asked for it.
    """
    _require_reach(source, file, **hub_kwargs)
    return CorruptDonorError(f"{source}: the weight index names {file}, which is not there")


def file_names(variant: str | None = None) -> tuple[str, str]:
    """The name of a checkpoint in one file, and of the index of one in several."""
    if variant is None:
        return SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    return f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"


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


def open_file(path: str) -> dict[str, View]:
    """A view of each tensor in one safetensors file, by name.

    Raises:
        CorruptDonorError: It is truncated, or not a safetensors file.
    """
    identity = _identity(path)
    header = read_header(path)
    return {name: View(path, identity, info.dtype, info.shape, info.data_offsets) for name, info in header.items()}


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
        weight_map = read_json(index, MAX_INDEX)["weight_map"]
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
        raise CorruptDonorError(f"{index} names files that are not beside it, or no safetensors: {some(outside)}")
    return weight_map
