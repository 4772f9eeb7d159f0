"""Do organs fit a recipient, and are their files in order? Found out from configs and headers, without weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from huggingface_hub.utils import TensorInfo
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.differences import native_differences
from not_hf.architecture.scaling import scale_problem
from not_hf.architecture.splicing import spliced_config
from not_hf.architecture.twin import meta_twin
from not_hf.architecture.upstream import SHARED_KWARGS, resolve_commit
from not_hf.composition.layout import Place, StackEntry, arrange, is_plain_name, require_distinct
from not_hf.composition.resolve import ResolvedOrgan, read_base_config, resolve_donor
from not_hf.composition.sources import DEFAULT_NAME, OrganSource
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor.compatibility import Mismatches, mismatches, recipient_differences
from not_hf.donor.loading import dtype_of, expert_problems, loading_problems, tensor_problems
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError, IncompatibleDonorError, NotHFError
from not_hf.hub.partial_download import list_tensors


class PlacedOrgan(Protocol):
    """An organ and its place, whether it is loaded already or not."""

    @property
    def place(self) -> Place:
        """Where it goes."""

    @property
    def spec(self) -> OrganSpec:
        """What its donor's config says."""

    @property
    def active(self) -> bool:
        """Whether it stands in the stack."""


def validate(
    organs: Sequence[ResolvedOrgan], recipient: PreTrainedConfig, loaded: Sequence[PlacedOrgan] = ()
) -> list[StackEntry]:
    """Check everything that configs tell of organs that are to go into a recipient.

    Args:
        organs: In load order.
        recipient: Native config of a model without organs.
        loaded: Organs that are there already.

    Returns:
        The stack that the active organs make of the recipient.

    Raises:
        NotHFError: A name is not plain, or there twice.
        IncompatibleDonorError: With every mismatch of every organ, or the first overlap of two.
    """
    if problems := stack_problems(organs, recipient, loaded):
        raise IncompatibleDonorError("; ".join(problems))
    return _arranged([*loaded, *organs], recipient)


def stack_problems(
    organs: Sequence[ResolvedOrgan], recipient: PreTrainedConfig, loaded: Sequence[PlacedOrgan] = ()
) -> list[str]:
    """Every mismatch of every organ with a recipient, or the first overlap of two. Arguments as in `validate`.

    Raises:
        NotHFError: A name is not plain, or there twice.
    """
    taken = {organ.place.name for organ in loaded}
    for organ in organs:
        if not is_plain_name(organ.name):
            raise NotHFError(
                f"donor_name {organ.name!r} is not a plain name, without dots and slashes; choose another"
            )
        if organ.name in taken:
            raise NotHFError(f"donor_name {organ.name!r} is taken; choose another")
    require_distinct([organ.name for organ in organs])
    problems = []
    for organ in organs:
        prefix, place = f"organ {organ.name!r}: " if len(organs) > 1 else "", organ.place
        found = mismatches(organ.spec, recipient, organ.source.position, place.mode)
        if organ.scale != 1 and (problem := scale_problem(organ.scale, place.mode)):
            found.append(problem)
        problems += [f"{prefix}{problem}" for problem in found]
    if not problems:
        try:
            _arranged([*loaded, *organs], recipient)
        except IncompatibleDonorError as error:
            problems.append(str(error))
    return problems


def merge_differences(
    stack: Sequence[StackEntry], organs: Iterable[PlacedOrgan], recipient: PreTrainedConfig
) -> list[str]:
    """In what the layers of a stack differ from those a native model of as many would have, from configs alone.

    An empty list means that organs can be merged into a native model; others work, but only here.

    Args:
        stack: As `validate` returned it.
        organs: The organs in it.
        recipient: As in `validate`.
    """
    specs = {organ.place.name: organ.spec for organ in organs}
    base = meta_twin(recipient).descriptions
    originals = {name: meta_twin(spec.base).descriptions[slice(*spec.config.span)] for name, spec in specs.items()}
    origins = [(recipient if name is None else specs[name].organ, n) for name, n in stack]
    layers = [(base if name is None else originals[name])[n] for name, n in stack]
    return native_differences(layers, meta_twin(spliced_config(recipient, origins)).descriptions)


def header_problems(spec: OrganSpec, headers: Mapping[str, TensorInfo]) -> list[str]:
    """What is wrong with a donor's weights as far as the headers of its files tell; the weights are not read.

    Args:
        spec: What the organ is.
        headers: What `list_tensors` gives for it.

    Returns:
        One line for each tensor that is missing, unexpected, mis-shaped, empty or not floating-point.
    """
    problems = tensor_problems(headers) + expert_problems(headers)
    hollow = {name: torch.empty(each.shape, dtype=dtype_of(each), device="meta") for name, each in headers.items()}
    try:
        _, info = DonorModel.fill(spec, hollow, source="the checkpoint", device_map="meta")
    except CorruptDonorError as error:
        return problems or [str(error)]
    return [*problems, *(problem for problem in loading_problems(info) if problem not in problems)]


@dataclass(frozen=True)
class SurveyedOrgan:
    """One organ of a donor, as far as its config and the headers of its files tell."""

    organ: ResolvedOrgan
    tensors: Mapping[str, TensorInfo]
    unreadable: str | None = None  # why there are no tensors


def survey(
    donor: str | os.PathLike[str], revision: str | None = None, subfolder: str | None = None, **hub_kwargs: Any
) -> tuple[DonorConfig, list[SurveyedOrgan]]:
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
    if odd := sorted(hub_kwargs.keys() - set(SHARED_KWARGS)):
        raise TypeError(f"unexpected arguments: {', '.join(odd)}")
    root, resolved = resolve_donor(OrganSource(DEFAULT_NAME, os.fspath(donor), revision, subfolder), hub_kwargs)
    organs = []
    for organ in resolved:
        where = {**hub_kwargs, "revision": organ.source.revision, "subfolder": organ.source.subfolder or ""}
        try:
            organs.append(SurveyedOrgan(organ, list_tensors(str(organ.source.donor), **where)))
        except CorruptDonorError as error:
            organs.append(SurveyedOrgan(organ, {}, str(error)))
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
    surveyed: Sequence[SurveyedOrgan],
    recipient: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    position: int | None = None,
    mode: str | None = None,
    **hub_kwargs: Any,
) -> Mismatches:
    """What `check_donor` lists, of organs that were surveyed. Arguments as there."""
    if isinstance(recipient, PreTrainedModel):
        recipient = getattr(recipient, "base_config", recipient.config)
    elif not isinstance(recipient, PreTrainedConfig):
        name = os.fspath(recipient)
        revision = resolve_commit(name, hub_kwargs)
        recipient, _ = read_base_config(name, None, {**hub_kwargs, "revision": revision})
    organs = [each.organ for each in surveyed]
    if len(organs) == 1:
        (organ,) = organs
        position = organ.source.position if position is None else position
        organs = [replace(organ, source=replace(organ.source, position=position, mode=mode or organ.source.mode))]
    problems, differences = stack_problems(organs, recipient), []
    for each in surveyed:
        prefix = f"organ {each.organ.name!r}: " if len(surveyed) > 1 else ""
        found = [each.unreadable] if each.unreadable else header_problems(each.organ.spec, each.tensors)
        problems += [f"{prefix}{problem}" for problem in found]
        others = recipient_differences(each.organ.spec, recipient, hub_kwargs.get("cache_dir"))
        differences += [f"{prefix}{other}" for other in others]
    return Mismatches(problems, () if problems else differences)


def _arranged(organs: Iterable[PlacedOrgan], recipient: PreTrainedConfig) -> list[StackEntry]:
    return arrange(recipient.num_hidden_layers, [organ.place for organ in organs if organ.active])
