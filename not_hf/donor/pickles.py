"""Files of `torch.save`, read as tensors by name and as nothing else."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from not_hf.errors import CorruptDonorError

# A checkpoint is nested a few levels deep; what goes on for longer holds itself.
MAX_DEPTH, MAX_ENTRIES = 32, 1_000_000

_WANTED = re.compile(r"GLOBAL (\S+)")


def read_tensors(file: str, name: str) -> dict[str, torch.Tensor]:
    """All tensors in a file, by their keys and indices in nested dicts, lists and tuples, joined with dots.

    Values stay in the file until they are used, where it is of a format that can be mapped into memory.

    Args:
        file: Its path.
        name: What it is called in errors.

    Raises:
        CorruptDonorError: It is no file of `torch.save`, is truncated, or holds more than plain data.
        OSError: It cannot be opened.
    """
    return _flatten(_read(file, name), name)


def _read(file: str, name: str) -> Any:
    """What `torch.save` wrote, without running any of it. Values stay in the file until they are used.

    Raises:
        CorruptDonorError: It is something else, truncated, or more than tensors.
    """
    with open(file, "rb") as stream:
        head = stream.read(9)
    if head[5:] == b"\0\0\0{":  # eight bytes for the length of a header, then the header in JSON
        raise CorruptDonorError(
            f"{name} is a safetensors file, not a pickle; load a donor with DonorModel.from_pretrained, "
            "cut one out of a model with DonorModel.from_base"
        )
    if head[:1] == b"\x80" and head[1:2] > b"\x03":  # of pickle itself; torch would stop before it can name anything
        raise CorruptDonorError(_refusal(name, _imports(file)))
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK\x03\x04"))
    except Exception as error:  # an unpickler raises anything on bytes that are no pickle
        # torch wraps what stopped its unpickler into advice to run the code all the same
        cause = (isinstance(error, pickle.UnpicklingError) and error.__context__) or error
        if wanted := _WANTED.findall(str(cause)):
            raise CorruptDonorError(_refusal(name, wanted)) from error
        reason = " ".join(str(cause).partition(". ")[0].split())[:200]
        raise CorruptDonorError(
            f"{name} cannot be read as tensors of torch.save ({type(cause).__name__}: {reason})"
        ) from error


def _refusal(name: str, wanted: Sequence[str]) -> str:
    what = f"its pickle would run {', '.join(wanted[:5])}" if wanted else "it is not a file of torch.save"
    return f"{name} is refused: {what}; not_hf loads tensors only, so torch.save the state_dict() of the layers"


def _imports(file: str) -> list[str]:
    """The globals that a pickle of protocol 4 or later names, by its text. Nothing is imported."""
    names: list[str] = []
    texts: list[str] = []
    with open(file, "rb") as stream, contextlib.suppress(ValueError, OverflowError, MemoryError):  # broken behind them
        for opcode, argument, _ in pickletools.genops(stream):
            if isinstance(argument, str):
                texts.append(argument)
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
    return list(dict.fromkeys(names))


def _flatten(content: Any, name: str) -> dict[str, torch.Tensor]:
    """All tensors in nested dicts, lists and tuples, by their keys and indices joined with dots."""
    tensors: dict[str, torch.Tensor] = {}
    todo = [("", 0, content)]  # the last one is next: what holds itself is soon too deep
    num_entries = 0
    while todo:
        path, depth, value = todo.pop()
        num_entries += 1
        if depth > MAX_DEPTH or num_entries > MAX_ENTRIES:
            raise CorruptDonorError(f"{name} is nested too deep to hold layers")
        if isinstance(value, torch.Tensor):
            if path in tensors:
                raise CorruptDonorError(f"{name} holds two tensors named {path!r}")
            tensors[path] = value
        elif isinstance(value, (Mapping, list, tuple)):
            items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            todo += [(f"{path}.{key}" if depth else str(key), depth + 1, item) for key, item in reversed(items)]
    return tensors
