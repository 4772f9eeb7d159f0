"""Check organs against a recipient, and donors' files: configs, headers and, of files on this machine, digests."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from huggingface_hub.utils import TensorInfo
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.differences import native_differences
from not_hf.architecture.scaling import scale_problem
from not_hf.architecture.splicing import moved_features
from not_hf.architecture.stack import layers_config
from not_hf.architecture.upstream import require_known, without_progress_bar
from not_hf.composition.layout import Place, StackEntry, arrange, require_free_names
from not_hf.composition.resolve import ResolvedOrgan, resolve_donor
from not_hf.composition.sources import DEFAULT_NAME, OrganSource
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor import compatibility
from not_hf.donor.compatibility import Mismatches
from not_hf.donor.delta import assembled
from not_hf.donor.loading import dtype_of, expert_problems, loading_problems, tensor_problems
from not_hf.donor.modeling import DonorModel
from not_hf.donor.saved_modules import is_saved, module_problems, saved_problems
from not_hf.errors import CorruptDonorError, IncompatibleDonorError, UnsupportedArchitectureError, some
from not_hf.hub.checkpoint import open_checkpoint
from not_hf.hub.digest import digest_problem
from not_hf.hub.partial_download import list_tensors
from not_hf.limits import MAX_LAYERS


class _PlacedOrgan(Protocol):
    """A `ResolvedOrgan`, or an organ in a model."""

    @property
    def place(self) -> Place: ...
    @property
    def spec(self) -> OrganSpec: ...
    @property
    def active(self) -> bool: ...


class Fit(NamedTuple):
    """Whether organs fit a recipient."""

    problems: list[str]  # why they do not
    stack: list[StackEntry]  # of the recipient with its active organs
    differences: list[str]  # from a native model of that stack, which prevent a merge


def validate(organs: Sequence[ResolvedOrgan], recipient: PreTrainedConfig, loaded: Sequence[_PlacedOrgan] = ()) -> Fit:
    """`examine`, but raise the problems.

    Raises:
        NotHFError: As in `examine`.
        IncompatibleDonorError: Lists all problems.
    """
    fit = examine(organs, recipient, loaded)
    if fit.problems:
        raise IncompatibleDonorError("; ".join(fit.problems))
    return fit


def examine(organs: Sequence[ResolvedOrgan], recipient: PreTrainedConfig, loaded: Sequence[_PlacedOrgan] = ()) -> Fit:
    """Check from configs alone whether organs fit a recipient.

    Args:
        organs: Organs to load, in load order.
        recipient: Native config of the recipient without organs.
        loaded: Organs that are already in the model.

    Raises:
        NotHFError: A name is invalid or taken.
    """
    require_free_names([organ.name for organ in organs], [organ.place.name for organ in loaded])

    def named(organ: ResolvedOrgan, problems: Iterable[str]) -> list[str]:
        return [f"organ {organ.name!r}: {problem}" if len(organs) > 1 else problem for problem in problems]

    problems = []
    for organ in organs:
        place = (organ.position, organ.mode)
        problems += named(organ, compatibility.mismatches(organ.spec, recipient, *place, in_stack=organ.active))
        if organ.scale != 1 and (problem := scale_problem(organ.scale)):
            problems += named(organ, [problem])
    if problems:
        return Fit(problems, [], [])
    try:
        active = [organ for organ in (*loaded, *organs) if organ.active]
        stack = arrange(recipient.num_hidden_layers, [organ.place for organ in active])
        if len(stack) > max(MAX_LAYERS, recipient.num_hidden_layers):
            raise IncompatibleDonorError(f"the stack would have {len(stack)} layers; at most {MAX_LAYERS} are built")
        specs = {organ.place.name: organ.spec for organ in active}
        origins = [(specs[name] if name else None, n) for name, n in stack]
        built, native = compatibility.describe_stack(origins, recipient)
    except IncompatibleDonorError as error:
        return Fit([str(error)], [], [])
    except UnsupportedArchitectureError as error:
        for organ in organs:
            found = compatibility.structure_problems(organ.spec, recipient, organ.place.position, organ.mode)
            problems += named(organ, found)
        problem = f"{compatibility.name_of(recipient)} cannot take these layers: {error}"
        return Fit(problems or [problem], [], [])
    if compatibility.unmatched_tensors(built, native):
        for organ in organs:
            found = compatibility.structure_problems(organ.spec, recipient, organ.place.position, organ.mode)
            problems += named(organ, found)
    return Fit(problems, stack, native_differences(built, native))


def header_problems(spec: OrganSpec, headers: Mapping[str, TensorInfo]) -> list[str]:
    """Report missing, unexpected, mis-shaped, empty and non-floating-point tensors, from `list_tensors`."""
    saved = {name: each for name, each in headers.items() if is_saved(name)}
    problems = tensor_problems(headers) + saved_problems(spec.config, saved)
    try:
        tensors = assembled(headers, spec.config)
    except CorruptDonorError as error:
        return [*problems, str(error)]
    problems += expert_problems(tensors)
    hollow = {name: torch.empty(each.shape, dtype=dtype_of(each), device="meta") for name, each in tensors.items()}
    try:
        with without_progress_bar():
            _, info = DonorModel.fill(spec, hollow, source="the checkpoint", device_map="meta")
    except CorruptDonorError as error:
        return problems or [str(error)]
    return [*problems, *(problem for problem in loading_problems(info) if problem not in problems)]


@dataclass(frozen=True)
class SurveyedOrgan:
    """One organ of a donor, and the headers of its files."""

    organ: ResolvedOrgan
    tensors: Mapping[str, TensorInfo]
    unreadable: str | None = None  # why there are no tensors


def survey(
    donor: str | os.PathLike[str],
    position: int | str | None = None,
    mode: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_kwargs: Any,
) -> tuple[DonorConfig, list[SurveyedOrgan]]:
    """Read the config of a donor, and its organs with their headers. Arguments and errors as in `check_donor`."""
    require_known(hub_kwargs)
    source = OrganSource(DEFAULT_NAME, os.fspath(donor), revision, subfolder, position, mode)
    root, resolved = resolve_donor(source, hub_kwargs)
    organs = []
    for organ in resolved:
        where = {**hub_kwargs, "revision": organ.revision, "subfolder": organ.subfolder or ""}
        try:
            found = list_tensors(str(organ.donor), organ.spec.config.weights_variant, **where)
            organs.append(SurveyedOrgan(organ, found))
        except CorruptDonorError as error:
            organs.append(SurveyedOrgan(organ, {}, str(error)))
    return root, organs


def check_donor(
    donor: str | os.PathLike[str],
    recipient: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    position: int | str | None = None,
    mode: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_kwargs: Any,
) -> Mismatches:
    """List all reasons why a donor or composition cannot be loaded into a recipient.

    `check_compatibility` reads configs only. This also reads the headers of the donor's files and, if the files are on
    this machine (a folder, or the Hub's cache), compares their tensors with the digest in the config. It downloads no
    weights.

    Args:
        donor: Folder or Hub ID of a donor or composition.
        recipient: Folder, Hub ID, native config or model.
        position: As in `check_compatibility`, like `mode` and `hub_kwargs`.
        revision: Branch, tag or commit of the donor's repo.
        subfolder: Folder of the donor within its repo.

    Returns:
        One line per problem, none if the donor can be loaded; with `differences` as in `check_compatibility`.

    Raises:
        NotHFError: A config is invalid, a composition is given another place, or the recipient is a donor.
        OSError: A config or a header cannot be read.

    Examples:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, check_donor
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     DonorModel.from_base(base, layers=(1, 3)).save_pretrained(folder)
        ...     check_donor(folder, base)
        ...     check_donor(folder, base, position=9)
        []
        ['cannot insert 2 layers at position 9 of 4 (the recipient); position must be between 0 and 4']
    """
    _, organs = survey(donor, position, mode, revision, subfolder, **hub_kwargs)
    return recipient_problems(organs, recipient, verify=True, **hub_kwargs)


def recipient_problems(
    surveyed: Sequence[SurveyedOrgan],
    recipient: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
    verify: bool = False,
    **hub_kwargs: Any,
) -> Mismatches:
    """`check_donor` for organs returned by `survey`; digests are compared if `verify`."""
    whole = compatibility.whole_config(recipient, hub_kwargs)
    config, live = layers_config(whole), cast(Any, recipient if isinstance(recipient, PreTrainedModel) else whole)
    fit = examine([each.organ for each in surveyed], config)
    problems, differences = [*fit.problems], []
    if fit.differences:
        differences.append(f"can run but not be merged into a native model: {some(fit.differences)}")
    for each in surveyed:
        prefix = f"organ {each.organ.name!r}: " if len(surveyed) > 1 else ""
        found = [each.unreadable] if each.unreadable else header_problems(each.organ.spec, each.tensors)
        if verify and not found:
            found = _local_digest_problem(each.organ, hub_kwargs)
        if not fit.problems:
            found += module_problems(each.organ.spec.config, live)
        problems += [f"{prefix}{problem}" for problem in found]
        others = compatibility.recipient_differences(each.organ.spec, config, hub_kwargs.get("cache_dir"))
        place = (each.organ.position, each.organ.mode)
        others += moved_features(getattr(live, "config", live), *place)
        others += compatibility.layer_type_differences(each.organ.spec, config, *place)
        differences += [f"{prefix}{other}" for other in others]
    return Mismatches(problems, () if problems else differences)


def _local_digest_problem(organ: ResolvedOrgan, hub_kwargs: Mapping[str, Any]) -> list[str]:
    """Compare an organ's tensors with their digest, if they are on this machine."""
    where = {**hub_kwargs, "revision": organ.revision, "subfolder": organ.subfolder or "", "local_files_only": True}
    try:
        variant = organ.spec.config.weights_variant
        tensors = open_checkpoint(str(organ.donor), variant=variant, **where)
        return digest_problem(tensors, organ.spec.config.digests, variant)
    except OSError:  # not in the cache
        return []
