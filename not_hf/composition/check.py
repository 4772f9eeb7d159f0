"""Do organs fit a recipient, and are their files in order? Found out from configs and headers, without weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub.utils import TensorInfo
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.differences import native_differences
from not_hf.architecture.scaling import scale_problem
from not_hf.architecture.upstream import require_known, resolve_commit
from not_hf.composition.layout import Place, StackEntry, arrange, require_free_names
from not_hf.composition.resolve import ResolvedOrgan, read_base_config, resolve_donor
from not_hf.composition.sources import DEFAULT_NAME, OrganSource
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor.compatibility import (
    Mismatches,
    config_mismatches,
    describe_stack,
    mismatches,
    name_of,
    odd_tensors,
    place_problems,
    recipient_differences,
    structure_problems,
)
from not_hf.donor.loading import dtype_of, expert_problems, loading_problems, tensor_problems
from not_hf.donor.modeling import DonorModel
from not_hf.errors import (
    CorruptDonorError,
    IncompatibleDonorError,
    NotHFError,
    UnsupportedArchitectureError,
)
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


class Fit(NamedTuple):
    """What configs tell of organs in a recipient."""

    problems: list[str]  # what keeps them out
    stack: list[StackEntry]  # that the active organs make of the recipient, if nothing does
    differences: list[str]  # in what a native model of that stack would compute otherwise: no merge will hold them


def validate(organs: Sequence[ResolvedOrgan], recipient: PreTrainedConfig, loaded: Sequence[PlacedOrgan] = ()) -> Fit:
    """`examine`, but what keeps the organs out is raised.

    Raises:
        NotHFError: As in `examine`.
        IncompatibleDonorError: With every problem.
    """
    fit = examine(organs, recipient, loaded)
    if fit.problems:
        raise IncompatibleDonorError("; ".join(fit.problems))
    return fit


def examine(organs: Sequence[ResolvedOrgan], recipient: PreTrainedConfig, loaded: Sequence[PlacedOrgan] = ()) -> Fit:
    """Check everything that configs tell of organs that are to go into a recipient.

    Args:
        organs: In load order.
        recipient: Native config of a model without organs.
        loaded: Organs that are there already.

    Raises:
        NotHFError: A name is not plain, or taken.
    """
    require_free_names([organ.name for organ in organs], [organ.place.name for organ in loaded])

    def told(organ: ResolvedOrgan, problems: Iterable[str]) -> list[str]:
        return [f"organ {organ.name!r}: {problem}" if len(organs) > 1 else problem for problem in problems]

    problems = []
    for organ in organs:
        place: tuple[Any, str] = (organ.source.position, organ.place.mode)
        if config_mismatches(organ.spec, recipient) or place_problems(organ.spec, recipient, *place):
            problems += told(organ, mismatches(organ.spec, recipient, *place))
        elif not organ.active:  # the others are looked at together
            problems += told(organ, structure_problems(organ.spec, recipient, *place))
        if organ.scale != 1 and (problem := scale_problem(organ.scale, organ.place.mode)):
            problems += told(organ, [problem])
    if problems:
        return Fit(problems, [], [])
    try:
        active = [organ for organ in (*loaded, *organs) if organ.active]
        stack = arrange(recipient.num_hidden_layers, [organ.place for organ in active])
        specs = {organ.place.name: organ.spec for organ in active}
        built, native = describe_stack([(specs[name] if name else None, n) for name, n in stack], recipient)
    except IncompatibleDonorError as error:
        return Fit([str(error)], [], [])
    except UnsupportedArchitectureError as error:
        return Fit([f"{name_of(recipient)} cannot take these layers: {error}"], [], [])
    if odd_tensors(built, native):  # of which organ?
        for organ in organs:
            place = (organ.place.position, organ.place.mode)
            problems += told(organ, structure_problems(organ.spec, recipient, *place))
    return Fit(problems, stack, native_differences(built, native))


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
    require_known(hub_kwargs)
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
    problems, differences = examine(organs, recipient).problems, []
    for each in surveyed:
        prefix = f"organ {each.organ.name!r}: " if len(surveyed) > 1 else ""
        found = [each.unreadable] if each.unreadable else header_problems(each.organ.spec, each.tensors)
        problems += [f"{prefix}{problem}" for problem in found]
        others = recipient_differences(each.organ.spec, recipient, hub_kwargs.get("cache_dir"))
        differences += [f"{prefix}{other}" for other in others]
    return Mismatches(problems, () if problems else differences)
