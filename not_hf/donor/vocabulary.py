"""Whether an organ and its recipient speak of the same tokens.

An organ holds layers only and works on hidden states, so any vocabulary will do; but what it learnt, it learnt from
tokens. What can be told without fetching anything is told in a warning.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedConfig
from transformers.utils import cached_file

from not_hf.config import OrganSpec

# Config keys that name tokens. Padding is left out: it is attended to by nothing, and often set as an afterthought.
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
) -> list[str]:
    """In what the vocabularies of an organ and of its recipient differ, as far as this machine can tell.

    Args:
        spec: What the organ is; its base is compared, and its base's tokenizer.
        recipient: Native config.
        donor_repo: Where the organ was read from, which may have a tokenizer of its own.
        recipient_repo: Where the recipient was read from.
        cache_dir: Of the Hub's client.

    Returns:
        One line per difference. An embedding matrix that is merely padded is none.
    """
    donor = spec.config
    differences = []
    ours, theirs = (getattr(config, "vocab_size", None) for config in (spec.base, recipient))
    if ours and theirs and ours != theirs and not _is_padding(*sorted((ours, theirs))):
        differences.append(f"vocab_size is {theirs} here, {ours} there")
    for key in TOKEN_IDS:
        ours, theirs = (getattr(config, key, None) for config in (spec.base, recipient))
        if not (ours is None or theirs is None or _ids(ours) & _ids(theirs)):
            differences.append(f"{key} is {theirs} here, {ours} there")
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
        return [f"the tokenizer here has {more} more tokens"]
    return [f"the tokenizer here lacks or renumbers {lost} of {len(ours)} tokens and has {more} more"]


def _is_padding(small: int, large: int) -> bool:
    """Whether a vocabulary was rounded up, as it is done for speed: to a multiple, and by little."""
    return large - small < small // 100 and any(large == -(-small // step) * step for step in _PADDED_TO)


def _ids(value: int | list[int]) -> set[int]:
    return set(value) if isinstance(value, list | tuple) else {value}


def _tokenizer_file(repo: Repo | None, cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The tokenizer's file where it is here already: nothing is fetched for a warning."""
    if repo is None or not repo.name:
        return None
    at = {"revision": repo.revision, "subfolder": repo.subfolder or "", "cache_dir": cache_dir}
    try:
        found = cached_file(repo.name, "tokenizer.json", local_files_only=True, **at)
    except OSError:
        return None
    return None if found is None else Path(found).resolve()


def _tokens(file: Path) -> dict[str, int]:
    """Ids by token; empty for a file that says it in another way."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: tokens with their scores, in the order of their ids
            vocabulary = {token: n for n, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
