"""The digest of a checkpoint: SHA-256 over the names, dtypes, shapes and bytes of its tensors.

It does not depend on how the tensors are spread over files. It finds damage and mix-ups; it is no signature, since
whoever can write the weights can write the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from not_hf.hub.checkpoint import View, file_names, open_checkpoint

_THREADS = 8  # SHA-256 runs without the GIL
_CHUNK = 1 << 20  # bytes


def digest(tensors: Mapping[str, View]) -> str:
    """Compute the digest: SHA-256 of one line per tensor, sorted by name.

    A line is the JSON list of name, dtype as in safetensors, shape, and SHA-256 of the bytes in the file, in hex,
    without spaces: `["organ.h.0.ln_1.bias","F32",[768],"e3b0…"]`.
    """
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = pool.map(lambda name: _row(name, tensors[name]), names)
        lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def digest_problem(
    tensors: Mapping[str, View], digests: Mapping[str, str] | None, variant: str | None = None
) -> list[str]:
    """Report whether the tensors of a checkpoint differ from its digest in `digests`, from `config.json`, if any."""
    file = file_names(variant)[0]
    expected = (digests or {}).get(file)
    if expected is None or (found := digest(tensors)) == expected:
        return []
    return [
        f"the tensors of {file} are damaged or of another save: their digest is {found:.16}…, in config.json it is "
        f"{expected:.16}…; download the donor again, or save it again if you changed them"
    ]


def digest_problems(folder: str | os.PathLike[str], digests: Mapping[str, str] | None) -> list[str]:
    """Report the same for all variants of a checkpoint in a folder, with `digests` from its `config.json`."""
    problems = []
    for file in digests or {}:
        variant = file.removeprefix("model").removesuffix(".safetensors").removeprefix(".") or None
        if any(os.path.exists(os.path.join(folder, name)) for name in file_names(variant)):
            problems += digest_problem(open_checkpoint(folder, variant=variant), digests, variant)
    return problems


def _row(name: str, view: View) -> list[Any]:
    total, (start, end) = hashlib.sha256(), view.data_offsets
    with open(view.path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            chunk = file.read(min(_CHUNK, end - start))
            if not chunk:
                raise OSError(f"{view.path} became shorter while it was read; try again")
            total.update(chunk)
            start += len(chunk)
    return [name, view.dtype, view.shape, total.hexdigest()]
