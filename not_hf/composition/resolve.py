"""Resolving a call: names become pinned repos with their configs, each of which is read once."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from not_hf.architecture.upstream import AUTO_KWARGS, SHARED_KWARGS, implementations, require_known, resolve_commit
from not_hf.composition.layout import Place
from not_hf.composition.sources import DEFAULT_NAME, DonorLike, OrganSource, read_entries
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor.cutting import has_adapters
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError, NotHFError, one_line, reading_base

# arguments of a model's `from_pretrained` that its config is not to take over, but for those that reach its repo
_NOT_OF_CONFIG = ("code_revision", "dtype", "quantization_config", "torch_dtype", "trust_remote_code")


@dataclass(frozen=True)
class ResolvedOrgan:
    """One organ: its repo pinned, its config read and checked.

    Args:
        source: Where it comes from and goes; revision, position, mode and scale are those in force.
        spec: What its donor's config says.
    """

    source: OrganSource
    spec: OrganSpec

    @property
    def name(self) -> str:
        """What it is called in the model."""
        return self.source.name

    @property
    def active(self) -> bool:
        """Whether it stands in the stack after loading."""
        return self.source.active

    @property
    def scale(self) -> float:
        """Of what its layers write to the residual stream."""
        return 1.0 if self.source.scale is None else self.source.scale

    @property
    def place(self) -> Place:
        """Where it goes, in the recipient's own layers."""
        return Place(self.name, self.source.position or 0, self.source.mode or "insert", self.spec.num_layers)


@dataclass(frozen=True)
class Resolved:
    """What `TransplantedForCausalLM.from_pretrained` was asked for: a recipient, and organs to put into it.

    Args:
        base: The recipient: folder, Hub ID or live model.
        base_config: Its native config, without organs.
        base_kwargs: For its `from_pretrained`; the revision is pinned, and the config is among them.
        organs: In load order.
        shared: How repos are reached, for base and donors alike.
        named_by: The donor that names the recipient, when the user does not.
    """

    base: str | PreTrainedModel
    base_config: PreTrainedConfig
    base_kwargs: dict[str, Any] = field(repr=False)  # with the token
    organs: Sequence[ResolvedOrgan]
    shared: dict[str, Any] = field(repr=False)
    named_by: str | None = None


def resolve(
    first: str | os.PathLike[str] | PreTrainedModel,
    donor: DonorLike | None,
    wish: OrganSource,
    config: PreTrainedConfig | None,
    base_kwargs: Mapping[str, Any],
) -> Resolved:
    """Tell base from donor in the forms that `TransplantedForCausalLM.from_pretrained` takes, and read their configs.

    Args:
        first: Its first argument: the recipient, or the donor repo when `donor` is `None`.
        donor: Its second argument.
        wish: Name, revision, subfolder and place that were asked for; its `donor` does not count.
        config: Config of the repo named first, if it was given.
        base_kwargs: The other keyword arguments.

    Raises:
        NotHFError: No donor is named, or a donor names no base.
        CorruptDonorError: A donor's config contradicts itself, or a composition is not in order.
        OSError: A config cannot be read.
    """
    if isinstance(first, nn.Module) and (not isinstance(first, PreTrainedModel) or has_adapters(first)):
        raise NotHFError(
            f"the recipient ({type(first).__name__}) has adapters or is wrapped; merge or unload them "
            "(merge_and_unload()), put the organ in, then put adapters on top"
        )
    kwargs = {key: value for key, value in base_kwargs.items() if key not in AUTO_KWARGS}
    shared = {key: value for key, value in kwargs.items() if key in SHARED_KWARGS}
    if isinstance(first, PreTrainedModel):
        if donor is None:
            raise NotHFError("name a donor to put into the live model: from_pretrained(model, donor)")
        if odd := sorted(kwargs.keys() - set(SHARED_KWARGS)):
            raise TypeError(f"{', '.join(odd)}: only for a recipient that is loaded here, this one is live")
        _, organs = resolve_donor(replace(wish, donor=donor), shared)
        native = getattr(first, "base_config", first.config)
        return Resolved(first, native, {}, organs, shared)
    if donor is not None:
        base, named_by = os.fspath(first), None
        _, organs = resolve_donor(replace(wish, donor=donor), shared)
        kwargs["revision"] = resolve_commit(base, kwargs)
    else:
        wish = replace(
            wish,
            donor=os.fspath(first),
            revision=wish.revision or kwargs.pop("revision", None),
            subfolder=wish.subfolder or kwargs.pop("subfolder", None),
        )
        root, organs = resolve_donor(wish, shared, config if isinstance(config, DonorConfig) else None)
        config, named_by = None, str(wish.donor)
        if root.base_model_name_or_path is None:
            raise NotHFError(f"{wish.donor} does not name its base; give it: from_pretrained(base, {wish.donor!r})")
        base = root.base_model_name_or_path
        kwargs = {**implementations(root), **kwargs}
        kwargs.pop("trust_remote_code", None)  # given for the repo that was named, not for the one that it names
        kwargs["revision"] = resolve_commit(base, {**kwargs, "revision": root.base_revision})
        if root.base_subfolder:
            kwargs["subfolder"] = root.base_subfolder
    native, kwargs = read_base_config(base, config, kwargs, named_by)
    return Resolved(base, native, kwargs, organs, shared, named_by)


def read_base_config(
    base: str, config: PreTrainedConfig | str | None, kwargs: dict[str, Any], named_by: str | None = None
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The native config of a recipient, and what to load it with.

    Args:
        base: Folder or Hub ID.
        config: It, or where it is read from; `None`: in the base's repo.
        kwargs: For the recipient's `from_pretrained`. Values of the config among them go into it, as in transformers.
        named_by: The donor that names the base, for errors.

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
    """The config of a donor, and its organs: the donor itself, or those that a composition lists.

    Args:
        source: Where the donor lies.
        hub_kwargs: How repos are reached.
        config: Of the donor, if it was read already.

    Raises:
        CorruptDonorError: A config contradicts itself, or a composition lists another one or itself.
        NotHFError: A composition cannot be had as it was asked for.
        OSError: A config cannot be read.
    """
    source = _pin(source, hub_kwargs)
    config = config or _read_config(source, hub_kwargs)
    if config.donors is None:
        return config, [_in_force(source, config)]
    entries = read_entries(config, source)
    if source.name not in ("", DEFAULT_NAME):
        raise NotHFError(
            f"{source.donor} is a composition whose organs have their names; leave out the name {source.name!r}"
        )
    asked = source.position is not None or source.mode is not None
    if asked or config.position is not None or config.mode != "insert":  # where AutoModelForCausalLM puts arguments
        raise NotHFError(
            f"{source.donor} is a composition whose organs have their places; load them one by one to move"
        )
    return config, [_resolve_entry(entry, source, hub_kwargs) for entry in entries]


def resolve_organ(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> ResolvedOrgan:
    """A donor that is one organ; arguments and errors as in `resolve_donor`."""
    require_known(hub_kwargs)
    source = _pin(source, hub_kwargs)
    return _in_force(source, _read_config(source, hub_kwargs))


def _resolve_entry(entry: OrganSource, composition: OrganSource, hub_kwargs: Mapping[str, Any]) -> ResolvedOrgan:
    """An organ that a composition lists."""
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
            "compositions cannot be nested: list its organs"
        )
    try:
        return _in_force(entry, config)
    except NotHFError as error:
        raise type(error)(f"organ {entry.name!r}: {error}") from error


def _pin(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> OrganSource:
    """The same organ with its revision resolved to a commit, so that all that is read of it is of one state."""
    if isinstance(source.donor, DonorModel):
        return source
    revision = resolve_commit(os.fspath(source.donor), {**hub_kwargs, "revision": source.revision})
    return replace(source, revision=revision)


def _read_config(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> DonorConfig:
    if isinstance(source.donor, DonorModel):
        return copy.deepcopy(source.donor.config)  # which stays the caller's
    return DonorConfig.from_pretrained(
        source.donor, **{**hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
    )


def _in_force(source: OrganSource, config: DonorConfig) -> ResolvedOrgan:
    """An organ whose place and scale are those that were asked for, else those of its own config."""
    spec = config.check()
    position = config.position if source.position is None else source.position
    scale = config.scale if source.scale is None else source.scale
    return ResolvedOrgan(replace(source, position=position, mode=source.mode or config.mode, scale=scale), spec)
