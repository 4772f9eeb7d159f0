"""Files of `torch.save`, read as tensors by name. Nothing in them is executed."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from not_hf.errors import CorruptDonorError, one_line
from not_hf.limits import MAX_DEPTH

# A small file can refer to one list many times, and a list that contains itself has no end.
MAX_ENTRIES, MAX_NAME = 500_000, 1000


def read_tensors(file: str, name: str) -> dict[str, torch.Tensor]:
    """All tensors in a file, by their keys and indices in nested dicts, lists and tuples, joined with dots.

    Values stay in the file until they are used, if torch can map its format into memory.

    Args:
        file: Its path.
        name: What to call it in errors.

    Raises:
        CorruptDonorError: It is not a file of `torch.save`, is truncated, or holds more than plain data.
        OSError: It cannot be opened.
    """
    with open(file, "rb") as stream:
        head = stream.read(9)
    if head[5:] == b"\0\0\0{":  # eight bytes for the length of a header, then the header in JSON
        raise CorruptDonorError(
            f"{name} is a safetensors file, not a pickle; load a donor with DonorModel.from_pretrained, "
            "cut one out of a model with DonorModel.from_base"
        )
    if is_zip := head.startswith(b"PK\x03\x04"):  # as torch tells
        _require_stored(file, name)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # an unpickler raises anything on bytes that are not a pickle
        raise CorruptDonorError(
            f"{name} cannot be read as tensors of torch.save: {_reason(file, head, error)}; "
            "not_hf loads tensors only, so torch.save the state_dict() of the layers"
        ) from error
    return _flatten(content, name)


def _require_stored(file: str, name: str) -> None:
    """Check that the entries of a zip archive are not compressed: a few bytes can unfold into gigabytes.

    Raises:
        CorruptDonorError: Some are, or it cannot be told.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            compressed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        reason = one_line(error, 200)
        raise CorruptDonorError(
            f"{name} cannot be read as tensors of torch.save: {reason}; torch.save the layers again"
        ) from error
    if compressed:
        raise CorruptDonorError(f"{name} is compressed, which torch.save never does; torch.save the layers again")


def _reason(file: str, head: bytes, error: Exception) -> str:
    """Why torch did not load a file that begins with `head`."""
    with contextlib.suppress(Exception):  # torch looks into files of its present format only
        if unsafe := sorted(get_unsafe_globals_in_checkpoint(file)):
            return f"its pickle would run {', '.join(unsafe[:5])}"
    if head[:1] == b"\x80" and head[1:2] > b"\x03":  # torch.save uses protocol 2
        return "it was written by pickle, not by torch.save"
    # torch wraps the error of its unpickler in advice on how to run the code anyway
    cause = (isinstance(error, pickle.UnpicklingError) and error.__context__) or error
    return one_line(cause, 200).partition(". ")[0]


def _flatten(content: Any, name: str) -> dict[str, torch.Tensor]:
    """All tensors in nested dicts, lists and tuples, by their keys and indices joined with dots.

    What has another key than a number or a short text is left out.
    """
    tensors: dict[str, torch.Tensor] = {}
    todo = [("", 0, content)]  # depth first: a list that contains itself soon exceeds MAX_DEPTH
    num_entries = 0
    while todo:
        path, depth, value = todo.pop()
        num_entries += 1
        if depth > MAX_DEPTH or num_entries > MAX_ENTRIES or len(path) > MAX_NAME:
            raise CorruptDonorError(f"{name} is nested too deep to hold layers")
        if isinstance(value, torch.Tensor):
            if value.is_nested:
                raise CorruptDonorError(f"{name} holds a nested tensor, {path}; torch.save dense ones")
            if path in tensors:
                raise CorruptDonorError(f"{name} holds two tensors named {path!r}")
            tensors[path] = value
        elif isinstance(value, (Mapping, list, tuple)):
            items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
            todo += [
                (f"{path}.{key}" if depth else str(key), depth + 1, item)
                for key, item in reversed(items)
                if _is_name(key)
            ]
    return tensors


def _is_name(key: Any) -> bool:
    """Whether a key can be a part of a tensor's name; some cannot even be written as text in finite time."""
    if isinstance(key, str):
        return len(key) <= MAX_NAME
    return isinstance(key, int) and key.bit_length() <= 64
