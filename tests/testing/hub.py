"""What the Hub and folders hold, and what the Hub was asked for."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi

from local_hub import Hub


def commit(repo: str) -> str:
    """The commit that a repo's default branch is at."""
    return HfApi().model_info(repo).sha


def entries(folder: Path) -> list[dict]:
    """What a composition lists."""
    return json.loads((folder / "config.json").read_text())["donors"]


def weights_asked_for(hub: Hub) -> list[str]:
    """Addresses of weights, and of their storage, since the requests were cleared."""
    return [record.path for record in hub.requests if "safetensors" in record.path or "/lfs/" in record.path]
