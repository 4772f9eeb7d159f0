"""Writing a safetensors file tensor by tensor, byte for byte as safetensors itself writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping

import torch

from not_hf.errors import CorruptDonorError
from not_hf.hub.checkpoint import DTYPES

# safetensors' names of dtypes in the order of its files: tensors of the last come first
_ORDER = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
_RANKS = {getattr(torch, DTYPES[name]): (rank, name) for rank, name in enumerate(_ORDER)}


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    values: Callable[[str], Iterable[torch.Tensor]],
    wrote: Callable[[int], object],
) -> None:
    """Write a file.

    Args:
        path: Of the file.
        tensors: Tensors on the meta device, by name, whose dtypes and shapes are written.
        values: Returns the values of one of them in order, in parts of any size.
        wrote: Is told how many bytes each part was.

    Raises:
        CorruptDonorError: The values of a tensor are more or fewer than its shape says.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_RANKS[item[1].dtype][0], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _RANKS[tensor.dtype][1], "shape": [*tensor.shape], "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            before = file.tell()
            for part in values(name):
                wrote(file.write(part.contiguous().view(torch.uint8).numpy().data))
            if file.tell() - before != tensor.nbytes:
                raise CorruptDonorError(
                    f"{name} has {file.tell() - before} bytes, expected {tensor.nbytes}; try again"
                )
