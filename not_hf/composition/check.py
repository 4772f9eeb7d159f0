"""Does a donor fit a recipient, and are its files in order? Found out before any weights are downloaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub.utils import TensorInfo
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.composition.resolve import Request, expand, pin, read_config, stack_problems
from not_hf.composition.sources import DEFAULT_NAME, OrganSource
from not_hf.config import DonorConfig
from not_hf.donor.compatibility import Mismatches, recipient_differences
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError, NotHFError
from not_hf.hub.partial_download import list_tensors
from not_hf.hub.repo import require_known


@dataclass(frozen=True)
class Surveyed:
    """One organ of a donor, as far as its config and the headers of its files tell."""

    source: OrganSource
    config: DonorConfig
    tensors: Mapping[str, TensorInfo]
    unreadable: str | None = None  # why there are no tensors


def survey(
    donor: str | os.PathLike[str], revision: str | None = None, subfolder: str | None = None, **hub_kwargs: Any
) -> tuple[DonorConfig, list[Surveyed]]:
    """A donor's config and its organs, of which a composition has several. No weights are read.

    Args:
        donor: Folder or Hub ID.
        revision: Branch, tag or commit; pinned, so that all that is read is of one state.
        subfolder: Folder of the donor within its repo.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, …

    Raises:
        NotHFError: A config is not what it is taken for, or not in order.
        OSError: A config or a header cannot be read.
    """
    require_known(hub_kwargs)
    wish = pin(OrganSource(DEFAULT_NAME, os.fspath(donor), revision, subfolder), hub_kwargs)
    root = read_config(wish, hub_kwargs)
    organs = []
    for source in expand(wish, root, hub_kwargs):
        where = {**hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
        config = read_config(source, hub_kwargs)
        try:
            organs.append(Surveyed(source, config, list_tensors(str(source.donor), **where)))
        except CorruptDonorError as error:
            organs.append(Surveyed(source, config, {}, str(error)))
    return root, organs


def check_donor(
    donor: str | os.PathLike[str],
    recipient: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    position: int | None = None,
    mode: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_kwargs: Any,
) -> Mismatches:
    """List everything that keeps a donor from working in a recipient, from configs and the headers of its files.

    `check_compatibility` reads configs alone; this one also reads a donor's headers, and all organs of a composition.

    Args:
        donor: Folder or Hub ID of an organ or a composition.
        recipient: Folder, Hub ID, native config or model.
        position: Where the organ is to go, in the recipient's own layers; `None`: as the donor says.
        mode: `"insert"` or `"replace"`; `None`: as the donor says.
        revision: Branch, tag or commit of the donor's repo.
        subfolder: Folder of the donor within its repo.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, …, for both repos.

    Returns:
        One line per problem; an empty list when the donor can be loaded. `differences` as in `check_compatibility`.

    Raises:
        NotHFError: A config contradicts itself, or is not what it is taken for; a composition is to be moved.
        OSError: A config or a header cannot be read.
    """
    root, organs = survey(donor, revision, subfolder, **hub_kwargs)
    if root.donors is not None and (position is not None or mode is not None):
        raise NotHFError(
            f"{donor} is a composition whose organs have their places; check them one by one to move them"
        )
    return recipient_problems(organs, recipient, position, mode, **hub_kwargs)


def recipient_problems(
    organs: Sequence[Surveyed],
    recipient: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    position: int | None = None,
    mode: str | None = None,
    **hub_kwargs: Any,
) -> Mismatches:
    """What `check_donor` lists, of organs that were surveyed. Arguments as there."""
    if not isinstance(recipient, PreTrainedConfig):
        base = recipient if isinstance(recipient, PreTrainedModel) else os.fspath(recipient)
        recipient = Request(base, hub_kwargs, []).base_config()
    placed = [
        (replace(organ.source, position=position, mode=mode) if len(organs) == 1 else organ.source, organ.config)
        for organ in organs
    ]
    problems, differences = stack_problems(placed, recipient), []
    for organ in organs:
        prefix = f"organ {organ.source.name!r}: " if len(organs) > 1 else ""
        found = [organ.unreadable] if organ.unreadable else DonorModel.header_problems(organ.config, organ.tensors)
        problems += [f"{prefix}{problem}" for problem in found]
        others = recipient_differences(organ.config, recipient, hub_kwargs.get("cache_dir"))
        differences += [f"{prefix}{other}" for other in others]
    return Mismatches(problems, () if problems else differences)
