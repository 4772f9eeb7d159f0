"""Compare the vocabularies of a donor's base and a recipient.

An organ runs on hidden states, so it fits any vocabulary, but it was trained with one. Differences give a warning.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from not_hf.config import OrganSpec

# Config keys of special tokens, without padding: it is never attended to, and often set later.
TOKEN_IDS = ("bos_token_id", "eos_token_id")
VOCABULARY = ("vocab_size", *TOKEN_IDS)
_PADDED_TO = (8, 16, 32, 64, 128, 256)


class Repo(NamedTuple):
    """A folder or a repo on the Hub."""

    name: str | os.PathLike[str] | None
    revision: str | None = None
    subfolder: str | None = None


def vocabulary_differences(
    spec: OrganSpec,
    recipient: PreTrainedConfig,
    donor_repo: Repo | None = None,
    recipient_repo: Repo | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    brings_rows: bool = False,
) -> list[str]:
    """List the differences between two vocabularies, except padding of the embedding matrix. Nothing is downloaded.

    Args:
        spec: The donor; its base is compared.
        recipient: Native config of the recipient.
        donor_repo: Repo of the donor, which has the base's tokenizer if the base is local.
        recipient_repo: Repo of the recipient.
        cache_dir: Cache of the Hub client.
        brings_rows: Whether the donor holds the embeddings of its tokens, so the recipient may have fewer.
    """
    donor = spec.config
    differences = []
    ours, theirs = (getattr(config, "vocab_size", None) for config in (spec.base, recipient))
    if ours and theirs and ours != theirs and not brings_rows and not _is_padding(*sorted((ours, theirs))):
        differences.append(f"vocab_size is {theirs} in the recipient, {ours} in the base")
    for key in TOKEN_IDS:
        ours, theirs = (getattr(config, key, None) for config in (spec.base, recipient))
        if not (ours is None or theirs is None or _ids(ours) & _ids(theirs)):
            differences.append(f"{key} is {theirs} in the recipient, {ours} in the base")
    base_repo = Repo(donor.base_model_name_or_path, donor.base_revision, donor.base_subfolder)
    if base_repo == recipient_repo:
        return differences
    repos = (base_repo, donor_repo)
    there = next(filter(None, (_tokenizer_file(repo, cache_dir) for repo in repos)), None)
    here = _tokenizer_file(recipient_repo, cache_dir)
    return differences + (_tokenizer_differences(there, here) if there and here else [])


def _tokenizer_differences(there: Path, here: Path) -> list[str]:
    if there == here or there.read_bytes() == here.read_bytes():
        return []
    ours, theirs = _tokens(there), _tokens(here)
    if not ours or not theirs or ours == theirs:
        return []
    lost = sum(theirs.get(token) != n for token, n in ours.items())
    more = len(theirs.keys() - ours.keys())
    if not lost:
        return [f"the recipient's tokenizer has {more} more tokens"]
    return [f"the recipient's tokenizer lacks or renumbers {lost} of {len(ours)} tokens and has {more} more"]


def _is_padding(small: int, large: int) -> bool:
    """Whether a vocabulary was only padded: by less than 1 %, to a multiple."""
    return large - small < small // 100 and any(large == -(-small // step) * step for step in _PADDED_TO)


def _ids(value: int | list[int]) -> set[int]:
    return set(value) if isinstance(value, list | tuple) else {value}


def _tokenizer_file(repo: Repo | None, cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """Find the tokenizer's file in a folder or the cache."""
    if repo is None or not repo.name:
        return None
    at = {"revision": repo.revision, "subfolder": repo.subfolder or "", "cache_dir": cache_dir}
    try:
        found = cached_file(repo.name, "tokenizer.json", local_files_only=True, **at)
    except OSError:
        return None
    return None if found is None else Path(found).resolve()


def _tokens(file: Path) -> dict[str, int]:
    """Read ids by token; empty for a file of another layout."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: tokens with their scores, in the order of their ids
            vocabulary = {token: n for n, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
