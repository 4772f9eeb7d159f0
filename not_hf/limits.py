"""Limits on what the files of a donor may hold.

A donor comes from people one may not know. Its real files stay far below these limits; a file beyond them is refused
before it costs memory or time. SECURITY.md says what this does and does not protect from.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Collection
from typing import Any, Union, get_args, get_origin

from not_hf.errors import CorruptDonorError

MAX_DEPTH = 32  # of lists and dicts in each other; real configs need 6
MAX_LAYERS = 512  # of a base or a stack; real models have up to about 200
MAX_COUNT = 2**16  # of anything else that a native config counts: heads, experts
MAX_ORGANS = 128  # of a composition
MAX_CONFIG = 2**20  # bytes of a config.json
MAX_INDEX = 2**26  # bytes of a weight index; those of the largest models have 2**24
MAX_HEADER = 25_000_000  # bytes of a safetensors header, as in huggingface_hub
MAX_CARD = 2**20  # bytes of a README.md
# Values that may be allocated for a donor: some per value in its files, and some for what is computed (masks)
MAX_VALUES_PER_STORED, MAX_VALUES_BESIDE = 4, 2**26

_MAX_INT = 2**63  # JSON has longer ones, which neither floats nor tensors can hold


def read_json(file: str | os.PathLike[str], max_bytes: int) -> Any:
    """Read a JSON file within limits.

    Raises:
        CorruptDonorError: It is too large or nested too deep, or a value is out of range.
        json.JSONDecodeError: It is not JSON.
        UnicodeDecodeError: It is not text.
        OSError: It cannot be read.
    """
    if (size := os.path.getsize(file)) > max_bytes:
        raise CorruptDonorError(f"{file} has {size:,} bytes; it must have at most {max_bytes:,}")
    with open(file, "rb") as stream:
        text = stream.read(max_bytes)
    try:
        value = json.loads(text.decode())
    except RecursionError:
        raise _too_deep(str(file)) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise CorruptDonorError(f"{file}: {error}") from error
    require_plain(value, str(file))
    return value


def require_plain(value: Any, where: str) -> None:
    """Check the nesting, integers and texts of a value that was read from JSON.

    Args:
        value: Its dicts and lists are checked inside.
        where: What it is, for the error.

    Raises:
        CorruptDonorError: It is nested too deep, or something in it cannot be computed with or saved again.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list | tuple):
                inner += each
            elif isinstance(each, int) and not -_MAX_INT <= each < _MAX_INT:
                raise CorruptDonorError(f"{where}: an integer of {each.bit_length()} bits; at most 64 are read")
            elif isinstance(each, str) and not _is_text(each):
                raise CorruptDonorError(f"{where}: {each!r:.100} is not valid Unicode")
        if not inner:
            return
        level = inner
    raise _too_deep(where)


def require_count(name: str, value: Any, most: int) -> None:
    """Check a count, or the counts in lists, against its limit.

    Raises:
        CorruptDonorError: One is greater.
    """
    if isinstance(value, list | tuple):
        for each in value:
            require_count(name, each, most)
    elif isinstance(value, int | float) and value > most:
        raise CorruptDonorError(f"donor config has {name} {value}; it must be at most {most}")


def require_few(name: str, items: Collection[Any], most: int) -> None:
    """Check how many items there are.

    Raises:
        CorruptDonorError: There are more.
    """
    if len(items) > most:
        raise CorruptDonorError(f"{name}: {len(items):,} entries; at most {most:,} are read")


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has the type of an annotation; an integer is a float, and a truth value is neither."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(is_of(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(is_of(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and (inner[1] is Any or all(is_of(item, inner[1]) for item in value.values()))
    return type(value) in {float: (int, float)}.get(kind, (kind,))


def _is_text(text: str) -> bool:
    """Whether a string can be written to a file: JSON can hold half a character."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _too_deep(where: str) -> CorruptDonorError:
    return CorruptDonorError(f"{where}: lists or objects are nested more than {MAX_DEPTH} deep")
