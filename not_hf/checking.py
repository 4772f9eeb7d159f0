"""Does a donor fit a recipient, and are its files in order? Found out before any weights are downloaded."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.composition import SHARED_KWARGS, Request, expand, pin, read_config, stack_problems
from not_hf.donor import DonorModel
from not_hf.entries import OrganSource
from not_hf.errors import CorruptDonorError
from not_hf.partial import list_tensors


def check_donor(
    donor: str | os.PathLike[str],
    recipient: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    position: int | None = None,
    mode: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_kwargs: Any,
) -> list[str]:
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
        One line per problem; an empty list when the donor can be loaded.

    Raises:
        NotHFError: A config contradicts itself, or is not what it is taken for.
        OSError: A config or a header cannot be read.
    """
    if odd := sorted(hub_kwargs.keys() - set(SHARED_KWARGS)):
        raise TypeError(f"unexpected arguments: {', '.join(odd)}")
    wish = pin(OrganSource("donor", os.fspath(donor), revision, subfolder, position, mode), hub_kwargs)
    organs = [
        (source, read_config(source, hub_kwargs)) for source in expand(wish, read_config(wish, hub_kwargs), hub_kwargs)
    ]
    if not isinstance(recipient, PreTrainedConfig):
        base = recipient if isinstance(recipient, PreTrainedModel) else os.fspath(recipient)
        recipient = Request(base, hub_kwargs, []).base_config()
    problems = stack_problems(organs, recipient)
    for source, config in organs:
        prefix = f"organ {source.name!r}: " if len(organs) > 1 else ""
        where = {**hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
        try:
            found = DonorModel.header_problems(config, list_tensors(str(source.donor), **where))
        except CorruptDonorError as error:
            found = [str(error)]
        problems += [f"{prefix}{problem}" for problem in found]
    return problems
