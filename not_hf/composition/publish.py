"""Pushing a donor that lies in a folder, without loading it into a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from huggingface_hub import CommitInfo

from not_hf.cards.common import README
from not_hf.cards.donor import updated_card
from not_hf.cards.license import inherit_license
from not_hf.composition.resolve import resolve_donor
from not_hf.composition.sources import OrganSource
from not_hf.donor.modeling import DonorModel
from not_hf.errors import NotHFError
from not_hf.hub.atomic_write import DRAFT
from not_hf.hub.push import PushOptions, push_folder


def push_donor(
    folder: str | os.PathLike[str], repo_id: str, ignore: Sequence[str] = (), **options: Unpack[PushOptions]
) -> CommitInfo:
    """Check a donor's folder strictly, then push it, its card brought up to date, as one commit.

    Args:
        folder: Of an organ, or of a composition: the organs that lie in it are pushed, those it refers to must be
            on the Hub.
        repo_id: As in `push_to_hub`.
        ignore: Patterns of names that stay here, besides those that begin with a dot and `Trainer`'s checkpoints.
        **options: As in `push_to_hub`.

    Raises:
        NotHFError: It is no donor, or refers to an organ on this machine.
        CorruptDonorError: An organ is damaged.
        OSError: The Hub refuses, or cannot be reached; the repo is as it was.
    """
    folder, token = Path(folder), options.get("token")
    if not folder.is_dir():
        raise NotHFError(f"no folder {folder}; name one that holds a donor")
    config, organs = resolve_donor(OrganSource("", folder), {} if token is None else {"token": token})
    sources = [organ.source for organ in organs]
    for source in sources:
        if source.is_local and source.donor != folder:
            raise NotHFError(f"organ {source.name!r} lies in {source.donor}, a folder of this machine; copy it in")
    inside = [source for source in sources if source.is_local]
    num_parameters, size = _measured(folder, inside)
    if inside != sources:  # the sizes of those that lie elsewhere are missing
        num_parameters = size = None
    stated = config.license
    inherit_license(config, revision=config.base_revision, token=token)

    def save(target: str, repo_id: str) -> None:
        readme = Path(target, README)  # the one that is published, if any
        card = updated_card(folder, config, num_parameters, size, repo_id, published=readme)
        ignored = shutil.ignore_patterns(".*", f"{DRAFT}*", "checkpoint-*", *ignore)
        shutil.copytree(folder, target, dirs_exist_ok=True, ignore=ignored)
        if config.license != stated:
            config.save_pretrained(target)
        card.save(readme)

    return push_folder(save, repo_id, **options)


def _measured(folder: Path, inside: Sequence[OrganSource]) -> tuple[int | None, int | None]:
    """Number of parameters and of bytes of the organs in a folder, each of which is loaded to check it."""
    num_parameters = size = 0
    for source in inside:
        donor = DonorModel.from_pretrained(folder, subfolder=source.subfolder or "")
        num_parameters += donor.num_parameters()
        size += sum(parameter.numel() * parameter.element_size() for parameter in donor.parameters())
    return num_parameters, size
