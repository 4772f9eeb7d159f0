"""Organs that are cut from a wide model, and the bytes that this took."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from typing import Any

from huggingface_hub import HfApi

from local_hub import Fault, Hub, Record
from not_hf import DonorModel
from testing.donors import same

SPAN = (3, 6)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 8, "num_attention_heads": 8}


def cut(source: Any, **options) -> DonorModel:
    """The layers of `SPAN`."""
    return DonorModel.from_base(source, SPAN, **options)


def is_cut(organ: DonorModel, model: Any, span: tuple[int, int] = SPAN) -> bool:
    """Whether an organ is what a cut from this live model gives."""
    return same(organ, DonorModel.from_base(model, span))


def nbytes(organ: DonorModel) -> int:
    """Of all its tensors."""
    return sum(parameter.numel() * parameter.element_size() for parameter in organ.parameters())


def weights(hub: Hub) -> list[Record]:
    """Requests that were served bytes of weights."""
    return [record for record in hub.requests if record.method == "GET" and record.path.startswith("/lfs/")]


FAULTS = {
    "too many requests": Fault(status=429, retry_after=0),
    "server error": Fault(status=500),
    "half a body": Fault(truncate=True),
    "the whole file": Fault(ignore_range=True),
    "another range": Fault(shift_range=64, honest=True),
    "another file": Fault(etag="0" * 40),
    "slow": Fault(delay=0.8),
}


def ranges(hub: Hub, fault: Fault, wrong: Callable[[int], bool], of_headers: bool = False) -> list[str]:
    """Give the n-th range of layers, or of headers, a fault if `wrong(n)`; returns the list they are put on."""
    seen: list[str] = []
    lock = threading.Lock()

    def choose(method, path, headers):
        if method == "GET" and path.startswith("/lfs/") and "range" in headers:
            if headers["range"].startswith(("bytes=0-", "bytes=8-")) is not of_headers:
                return None
            with lock:
                seen.append(headers["range"])
                return fault if wrong(len(seen) - 1) else None
        return None

    hub.fault = choose
    return seen


def push(model: Any, repo: str, **options) -> None:
    """Upload a model; the options are those of `upload_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, **options)
