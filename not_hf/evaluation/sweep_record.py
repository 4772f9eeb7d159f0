"""The record of a sweep, `sweep.json`: written while it runs, and read to go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from not_hf.donor.modeling import DonorModel
from not_hf.errors import NotHFError
from not_hf.evaluation.swept_places import BASE, Nats

_FILE = "sweep.json"
_DIGESTS = {
    "donor_digest": "organ, or of one at another scale",
    "windows_digest": "text",
    "training_digest": "training",
}
_SECONDS = 30  # between two saves of an unfinished sweep


def write_record(folder: str | os.PathLike[str], document: dict[str, Any], file: str = _FILE) -> None:
    """Write a record into a folder, in place of an earlier one; created if missing.

    Numbers that are not finite are written as null.
    """
    os.makedirs(folder, exist_ok=True)
    draft = Path(folder, f".{file}.draft")
    draft.write_text(json.dumps(_finite(document), allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, Path(folder, file))


def read_record(
    folder: str | os.PathLike[str], about: Mapping[str, Any], num_windows: int
) -> dict[str, NDArray[np.float64]]:
    """Read what a folder holds of the measurements of the same sweep.

    Raises:
        NotHFError: It holds another sweep, or something else of that name.
    """
    file = Path(folder, _FILE)
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        others = [key for key in _DIGESTS if found.get(key) != about.get(key)]
        nats = {key: np.array(values, dtype=np.float64) for key, values in found["windows"]["nats"].items()}
        _ = [place_of(key) for key in nats.keys() - {BASE}]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotHFError(f"{file} is no record of a sweep; delete it, or choose another folder") from error
    if others:
        raise NotHFError(f"{file} is of another {_DIGESTS[others[0]]}; delete it, or choose another folder")
    if any(len(each) != num_windows for each in nats.values()):
        raise NotHFError(f"{file} is damaged: not all of its lists have {num_windows} windows; delete it")
    return nats


def place_of(key: str) -> tuple[str, int]:
    """Return the mode and position of a place by the key of its measurements."""
    mode, position = key.split()
    return mode, int(position)


@contextlib.contextmanager
def saving_in_time(save: Callable[[], None], nats: Nats) -> Iterator[Callable[[], None]]:
    """Yield a function that saves from time to time; at the end of the block it is saved, if anything was measured."""
    saved, before = time.monotonic(), _num_missing(nats)

    def save_in_time() -> None:
        nonlocal saved
        if time.monotonic() - saved > _SECONDS:
            save()
            saved = time.monotonic()

    try:
        yield save_in_time
    finally:
        if _num_missing(nats) != before:
            save()


def complete(nats: Nats) -> list[str]:
    """Return the keys of the places that are measured."""
    return [key for key, each in nats.items() if not np.isnan(each).any()]


def _num_missing(nats: Nats) -> int:
    return sum(int(np.isnan(each).sum()) for each in nats.values())


def donor_digest(donor: DonorModel) -> str:
    """Digest the names and values of an organ's tensors, and its scale."""
    digest = hashlib.sha256()
    if donor.config.scale != 1:
        digest.update(f"scale {donor.config.scale}".encode())
    for name, tensor in sorted(donor.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _finite(value: Any) -> Any:
    """Replace infinity and NaN, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
