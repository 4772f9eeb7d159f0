"""Fetching the files of PEFT's adapters, as other files are: PEFT itself asks the Hub also where it must not."""

from __future__ import annotations

import os
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from not_hf.architecture.upstream import fetch_file, resolve_commit
from not_hf.errors import reading_repo


def fetch_adapter(name: str, **hub_kwargs: Any) -> str:
    """Return the folder on this machine that holds an adapter's config and weights, fetched if need be.

    Args:
        name: Folder or Hub ID of the adapter.
        **hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, …

    Raises:
        OSError: They cannot be fetched, or one is not there.
    """
    where = {**hub_kwargs, "revision": resolve_commit(name, hub_kwargs)}
    with reading_repo(name):
        config = fetch_file(name, ADAPTER_CONFIG_NAME, **where)
        weights = fetch_file(name, ADAPTER_SAFE_WEIGHTS_NAME, **where) or fetch_file(
            name, ADAPTER_WEIGHTS_NAME, **where
        )
    if config is None or weights is None:
        place = "/".join(filter(None, (name, hub_kwargs.get("subfolder"))))
        cached = " in the cache" if hub_kwargs.get("local_files_only") and not os.path.isdir(name) else ""
        raise OSError(f"{place} has no {ADAPTER_CONFIG_NAME if config is None else ADAPTER_SAFE_WEIGHTS_NAME}{cached}")
    return os.path.dirname(config)
