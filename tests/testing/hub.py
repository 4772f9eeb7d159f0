"""What the Hub and folders hold, and what the Hub was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import (
    HfApi,
    hf_hub_download,
)

from local_hub import Fault, FaultHook, Hub, Record

WEIGHTS = bytes(range(256)) * 40  # 10 kB


CARD = """---
base_model: me/search-base
base_model_relation: adapter
library_name: not_hf
license: mit
datasets: [me/server-data]
tags: [organ]
---
# Card
"""


def commit(repo: str) -> str:
    """The commit that a repo's default branch is at."""
    return HfApi().model_info(repo).sha


def entries(folder: Path) -> list[dict]:
    """What a composition lists."""
    return json.loads((folder / "config.json").read_text())["donors"]


def weights_asked_for(hub: Hub) -> list[str]:
    """Addresses of weights, and of their storage, since the requests were cleared."""
    return [record.path for record in hub.requests if "safetensors" in record.path or "/lfs/" in record.path]


def upload(api: HfApi, repo: str, path: str, content: bytes, **kwargs: object) -> str:
    """Commit one file; returns the commit's hash."""
    return api.upload_file(repo_id=repo, path_in_repo=path, path_or_fileobj=content, **kwargs).oid


def read(repo: str, path: str, **kwargs: object) -> bytes:
    """Download one file."""
    return Path(hf_hub_download(repo, path, **kwargs)).read_bytes()


def served(hub: Hub, method: str, part: str) -> list[Record]:
    """The requests so far of one method to an address that contains `part`."""
    return [record for record in hub.requests if record.method == method and part in record.path]


def once(fault: Fault, method: str, part: str) -> FaultHook:
    """A hook that makes the first matching request go wrong."""
    left = [fault]

    def hook(asked: str, path: str, headers: Mapping[str, str]) -> Fault | None:
        return left.pop() if left and asked == method and part in path else None

    return hook
