"""Resolve names to pinned repos and their configs, each of which is read once."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from not_hf.architecture.adapters import has_adapters
from not_hf.architecture.stack import layers_config
from not_hf.architecture.upstream import (
    AUTO_KWARGS,
    SHARED_KWARGS,
    implementations,
    require_known,
    resolve_commit,
)
from not_hf.composition.layout import Place
from not_hf.composition.sources import DEFAULT_NAME, DonorLike, OrganSource, read_entries
from not_hf.config import MODES, DonorConfig, OrganSpec
from not_hf.donor.compatibility import require_no_repo
from not_hf.donor.generation_config import read_generation_config
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError, NotHFError, one_line, reading_base
from not_hf.hub.consistent_read import require_same_save, saved_digests

# Arguments of a model's `from_pretrained` that are not values of its config, besides those in HUB_KWARGS.
_NOT_OF_CONFIG = ("code_revision", "dtype", "quantization_config", "torch_dtype", "trust_remote_code")

BEST = "best"  # as a position: where a sweep found the organ best


@dataclass(frozen=True)
class ResolvedOrgan(OrganSource):
    """An organ to load: its source, with a pinned revision and without defaults, and its donor's checked config."""

    position: int = 0
    mode: str = "insert"
    scale: float = 1.0
    spec: OrganSpec = field(kw_only=True)

    @property
    def place(self) -> Place:
        """Place in the recipient."""
        return Place(self.name, self.position, self.mode, self.spec.config.num_organ_layers)


@dataclass(frozen=True)
class Resolved:
    """A recipient, and organs to load into it.

    Args:
        base: The recipient: folder, Hub ID or live model.
        base_config: The native config of its layers, without organs.
        base_kwargs: Arguments of its `from_pretrained`, with the config and a pinned revision.
        organs: Organs to load, in load order.
        shared: Hub arguments for base and donors (`token`, `cache_dir`, …).
        named_by: The donor whose config names the base, unless the user does.
        generation_config: That of this donor, if it has one.
    """

    base: str | PreTrainedModel
    base_config: PreTrainedConfig
    base_kwargs: dict[str, Any] = field(repr=False)  # with the token
    organs: Sequence[ResolvedOrgan]
    shared: dict[str, Any] = field(repr=False)
    named_by: str | None = None
    generation_config: GenerationConfig | None = None


def resolve(
    first: str | os.PathLike[str] | PreTrainedModel,
    donor: DonorLike | None,
    source: OrganSource,
    config: PreTrainedConfig | None,
    base_kwargs: Mapping[str, Any],
) -> Resolved:
    """Resolve the arguments of `TransplantedForCausalLM.from_pretrained`: pin repos and read configs.

    Args:
        first: The recipient, or the donor if `donor` is `None`.
        donor: The donor.
        source: Name, revision, subfolder and place; its `donor` is ignored.
        config: Config of `first`, if given.
        base_kwargs: Other keyword arguments.

    Raises:
        NotHFError: There is no donor, or no base.
        CorruptDonorError: A config is invalid.
        OSError: A config cannot be read.
    """
    if isinstance(first, DonorModel):
        raise NotHFError("the first argument is a DonorModel, not a recipient; name the base first, then the donor")
    if isinstance(first, nn.Module) and (not isinstance(first, PreTrainedModel) or has_adapters(first)):
        raise NotHFError(
            f"the recipient ({type(first).__name__}) has adapters or is wrapped; merge or unload them "
            "(merge_and_unload()), load the organ, then add adapters again"
        )
    if isinstance(first, nn.Module) and vars(first).get("active_donors"):
        raise NotHFError("the recipient is get_base_model() of a model with organs; give that model")
    kwargs = {key: value for key, value in base_kwargs.items() if key not in AUTO_KWARGS}
    shared = {key: value for key, value in kwargs.items() if key in SHARED_KWARGS}
    if isinstance(first, PreTrainedModel):
        if donor is None:
            raise NotHFError("a live recipient needs a donor; give it: from_pretrained(model, donor)")
        other = set() if config in (None, first.config) else {"config"}
        if unusable := sorted((kwargs.keys() | other) - set(SHARED_KWARGS)):
            raise TypeError(f"unexpected arguments for a live recipient: {', '.join(unusable)}; leave them out")
        _, organs = resolve_donor(replace(source, donor=donor), shared)
        native = layers_config(getattr(first, "base_config", first.config))
        return Resolved(first, native, {}, organs, shared)
    generation = None
    if donor is not None:
        base, named_by = os.fspath(first), None
        _, organs = resolve_donor(replace(source, donor=donor), shared)
        kwargs["revision"] = resolve_commit(base, kwargs)
    else:
        named_by = os.fspath(first)
        if not isinstance(config, DonorConfig | None):
            raise NotHFError(
                f"without a recipient, config is that of the donor {named_by}, got {type(config).__name__}; to choose "
                "the recipient's config, name the recipient first: from_pretrained(base, donor, config=...)"
            )
        revision = source.revision or kwargs.pop("revision", None)
        subfolder = source.subfolder or kwargs.pop("subfolder", None)
        source = _pin(replace(source, donor=named_by, revision=revision, subfolder=subfolder), shared)
        root, organs = resolve_donor(source, shared, config)
        config = None
        if "generation_config" not in kwargs:
            where = {**shared, "revision": source.revision, "subfolder": source.subfolder or ""}
            generation = read_generation_config(str(source.donor), where)
        if root.base_model_name_or_path is None:
            raise NotHFError(f"{named_by} does not name its base; give it: from_pretrained(base, {named_by!r})")
        base = root.base_model_name_or_path
        kwargs = {**implementations(root), **kwargs}
        kwargs.pop("trust_remote_code", None)  # the caller trusts the donor, not the base that it names
        kwargs["revision"] = resolve_commit(base, {**kwargs, "revision": root.base_revision})
        if root.base_subfolder:
            kwargs["subfolder"] = root.base_subfolder
    if not (isinstance(config, PreTrainedConfig) or _LABELS & kwargs.keys()):
        kwargs |= _num_labels(organs)
    native, kwargs = read_base_config(base, config, kwargs, named_by)
    return Resolved(base, layers_config(native), kwargs, organs, shared, named_by, generation)


# Arguments by which a caller chooses the classes of a classifier
_LABELS = {"num_labels", "id2label", "label2id"}


def _num_labels(organs: Sequence[ResolvedOrgan]) -> dict[str, int]:
    """Return how many classes a recipient has by the classifier that an organ holds, an active one if any does."""
    labels = [organ.spec.config.labels for organ in sorted(organs, key=lambda organ: not organ.active)]
    return next(({"num_labels": len(each)} for each in labels if each), {})


def read_base_config(
    base: str, config: PreTrainedConfig | str | None, kwargs: dict[str, Any], named_by: str | None = None
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Read the native config of a recipient.

    Args:
        base: Folder or Hub ID of the recipient.
        config: The config, or another place to read it from.
        kwargs: Arguments of the recipient's `from_pretrained`. As in transformers, they may override config values.
        named_by: The donor whose config names the base, for errors.

    Returns:
        The config, and the remaining arguments together with it.

    Raises:
        NotHFError: The base is a donor.
        OSError: The config cannot be read.
    """
    if not isinstance(config, PreTrainedConfig):
        kept = {key: kwargs[key] for key in _NOT_OF_CONFIG if key in kwargs}
        hub = {key: value for key, value in kwargs.items() if key in (*SHARED_KWARGS, "revision", "subfolder")}
        code = {key: kept[key] for key in ("code_revision", "trust_remote_code") if key in kept}
        values = {key: value for key, value in kwargs.items() if key not in _NOT_OF_CONFIG and key not in hub}
        with reading_base(base, named_by):
            read: Any = AutoConfig.from_pretrained(config or base, return_unused_kwargs=True, **hub, **code, **values)
        config, unused = read
        kwargs = {**hub, **kept, **unused}
    if isinstance(config, DonorConfig):
        raise NotHFError(f"{base} is a donor, not a recipient; name the base first, then the donor")
    assert isinstance(config, PreTrainedConfig)
    return config, {**kwargs, "config": config}


def resolve_donor(
    source: OrganSource, hub_kwargs: Mapping[str, Any], config: DonorConfig | None = None
) -> tuple[DonorConfig, list[ResolvedOrgan]]:
    """Read the config of a donor, unless given, and resolve its organ, or those that a composition lists.

    Raises:
        CorruptDonorError: A config is invalid, or compositions are nested.
        NotHFError: A composition is given a name or place.
        OSError: A config cannot be read.
    """
    source = _pin(source, hub_kwargs)
    config = config or _read_config(source, hub_kwargs)
    if config.donors is None:
        return config, [_checked(source, config)]
    assert not isinstance(source.donor, DonorModel)  # which is one organ
    digests = config.digests or saved_digests(source.donor, source.subfolder)
    entries = read_entries(config, source)
    if source.name not in ("", DEFAULT_NAME):
        raise NotHFError(
            f"{source.donor} is a composition, whose organs have names; leave out the name {source.name!r}"
        )
    place = (source.position, source.mode, config.position)  # AutoModelForCausalLM puts arguments into the config
    if any(value is not None for value in place) or config.mode != "insert":
        raise NotHFError(
            f"{source.donor} is a composition, whose organs have places; to move one, name its repo or subfolder"
        )
    organs = [_resolve_entry(entry, source, hub_kwargs) for entry in entries]
    require_same_save(source.donor, source.subfolder, digests)
    return config, organs


def resolve_organ(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> ResolvedOrgan:
    """Resolve a donor that is one organ. Arguments and errors as in `resolve_donor`."""
    require_known(hub_kwargs)
    source = _pin(source, hub_kwargs)
    return _checked(source, _read_config(source, hub_kwargs))


def _resolve_entry(entry: OrganSource, composition: OrganSource, hub_kwargs: Mapping[str, Any]) -> ResolvedOrgan:
    """Resolve an organ that a composition lists."""
    entry = _pin(entry, hub_kwargs)
    try:
        config = _read_config(entry, hub_kwargs)
    except OSError as error:
        raise OSError(
            f"{composition.donor} lists organ {entry.name!r} in {entry.donor}, which cannot be read: {one_line(error)}"
        ) from error
    if config.donors is not None:
        raise CorruptDonorError(
            f"{composition.donor}: organ {entry.name!r} is a composition itself ({entry.donor}); "
            "list its organs instead, compositions cannot be nested"
        )
    try:
        return _checked(entry, config)
    except NotHFError as error:
        raise type(error)(f"organ {entry.name!r}: {error}") from error


def _pin(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> OrganSource:
    """Resolve the revision to a commit, so that everything read from the repo is consistent."""
    if isinstance(source.donor, DonorModel):
        require_no_repo(source.revision, source.subfolder)
        return source
    if isinstance(source.donor, nn.Module):
        raise NotHFError(
            f"the donor is a {type(source.donor).__name__}, not a DonorModel; name the base first, then the donor, "
            "which DonorModel.from_base cuts out of a model"
        )
    revision = resolve_commit(os.fspath(source.donor), {**hub_kwargs, "revision": source.revision})
    return replace(source, revision=revision)


def _read_config(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> DonorConfig:
    if isinstance(source.donor, DonorModel):
        return copy.deepcopy(source.donor.config)  # the caller keeps the model
    return DonorConfig.from_pretrained(
        source.donor, **{**hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
    )


def _checked(source: OrganSource, config: DonorConfig) -> ResolvedOrgan:
    """Check a donor's config, which completes the place and scale of its source."""
    if BEST in (source.position, config.position):  # AutoModelForCausalLM puts arguments into the config
        config = copy.copy(config)
        config.position, config.mode = _best_place(config, source.mode)
        source = replace(source, position=None)
    spec = config.check()
    own = {key: getattr(config, key) for key in ("position", "mode", "scale") if getattr(source, key) is None}
    return ResolvedOrgan(**{**vars(source), **own}, spec=spec)


def _best_place(config: DonorConfig, mode: str | None) -> tuple[int, str]:
    """Return the position and mode at which a sweep found an organ best; `mode`: the one that is wanted, if any."""
    best = config.best_position
    if best is None:
        raise NotHFError(
            f"position={BEST!r} needs a donor that a sweep was recorded for; give a position, or use "
            "sweep_positions(...).record(donor) and save the donor"
        )
    position, recorded = best.get("position"), best.get("mode")
    if type(position) is not int or recorded not in MODES:
        raise CorruptDonorError(f"donor config best_position must hold a position and a mode, got {best!r:.200}")
    if mode not in (None, recorded):
        raise NotHFError(
            f"the best position that a sweep recorded is for mode {recorded!r}, not {mode!r}; leave out the mode, "
            "or give a position"
        )
    return position, recorded
