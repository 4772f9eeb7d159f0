"""Access to a repo on the Hub: the keyword arguments of `from_pretrained` for it, and pinning its revision."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers.utils.hub import resolve_revision

# Where a repo and a folder in it are, and how to reach them; named as in transformers
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Those that several repos share; each has its own revision and subfolder
SHARED_KWARGS = tuple(key for key in HUB_KWARGS if key not in ("revision", "subfolder"))


def require_known(kwargs: Collection[str], known: Collection[str] = SHARED_KWARGS) -> None:
    """Check the keyword arguments that say how a repo is reached.

    Raises:
        TypeError: Naming those that are not known.
    """
    if unknown := sorted(set(kwargs) - set(known)):
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}; expected are {', '.join(known)}")


def resolve_commit(source: str, hub_kwargs: Mapping[str, Any]) -> str | None:
    """Resolve a revision to its commit once, so that all files read from the repo are of one commit."""
    return resolve_revision(
        source,
        hub_kwargs.get("revision"),
        token=hub_kwargs.get("token"),
        local_files_only=hub_kwargs.get("local_files_only", False),
        cache_dir=hub_kwargs.get("cache_dir"),
    )
