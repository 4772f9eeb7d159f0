"""The header of a safetensors file: which tensors it holds, and where."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from huggingface_hub.utils import TensorInfo

from not_hf.errors import CorruptDonorError, one_line
from not_hf.hub.ranges import RemoteFile
from not_hf.limits import MAX_HEADER, require_plain

# Bits per value by safetensors' name of the dtype; a file may hold tensors that are not read here
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def size_of(tensor: TensorInfo) -> int:
    """Number of bytes that a tensor takes in its file."""
    start, end = tensor.data_offsets
    return end - start


def read_remote_header(file: RemoteFile) -> dict[str, TensorInfo]:
    """The tensors of a file on the Hub, from its header alone.

    Raises:
        OSError: The header cannot be read.
        CorruptDonorError: It is not a safetensors header, or contradicts the size of the file.
    """
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else 0
    _check_length(length, file.size, file.url)
    return _parse(file.read(8, 8 + length), file.size, file.url)


def read_header(path: str) -> dict[str, TensorInfo]:
    """The tensors of a file on this machine.

    Raises:
        OSError: It cannot be read.
        CorruptDonorError: It has no safetensors header, or the header contradicts its size.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        _check_length(length, size, path)
        return _parse(file.read(length), size, path)


def _check_length(length: int, size: int, where: str) -> None:
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise CorruptDonorError(f"{where} is not a whole safetensors file")


def _parse(text: bytes | bytearray, size: int, where: str) -> dict[str, TensorInfo]:
    """The tensors that a header lists; `data_offsets` count from the file's beginning.

    As strict as safetensors: the tensors follow each other without gaps and fill the file, and each is as long as its
    shape and dtype require. Reading parts of a file depends on it.
    """
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        metadata = entries.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ are not texts by name")
        require_plain([*entries, metadata], "header")
        tensors = {name: _info(entry, 8 + len(text)) for name, entry in entries.items()}
        end = 8 + len(text)
        for name, info in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
            if info.data_offsets[0] != end:
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            end = info.data_offsets[1]
        if end != size:
            raise ValueError(f"its tensors end at byte {end} of {size}")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptDonorError(f"{where} is not a whole safetensors file: {one_line(error, 200)}") from error
    return tensors


def _info(entry: dict[str, Any], first: int) -> TensorInfo:
    dtype, shape, (start, end) = (entry.pop(key) for key in ("dtype", "shape", "data_offsets"))
    if entry:  # other keys are not read, and must be JSON for safetensors as well
        require_plain(entry, "header")
    numbers = (*shape, start, end)
    if dtype not in BITS or len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"a tensor of dtype {dtype!r:.50} and shape {shape!r:.100} cannot be read")
    if 8 * (end - start) != BITS[dtype] * math.prod(shape):
        raise ValueError(f"a tensor of dtype {dtype} and shape {shape!r:.100} is not {end - start} bytes long")
    return TensorInfo(dtype=dtype, shape=list(shape), data_offsets=(first + start, first + end))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate tensor name")
    return found
