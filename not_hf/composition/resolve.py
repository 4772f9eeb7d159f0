"""Which repos a call means: a base and a donor, a donor that names its base, a composition of several organs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from not_hf.architecture.scaling import scale_problem
from not_hf.architecture.upstream import AUTO_KWARGS, implementations
from not_hf.composition.layout import Origin, Place, arrange
from not_hf.composition.sources import DEFAULT_NAME, DonorSource, OrganSource, is_plain_name, read_entries
from not_hf.config import DonorConfig
from not_hf.donor.compatibility import mismatches
from not_hf.donor.cutting import has_adapters
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError, IncompatibleDonorError, NotHFError, one_line, reading_base
from not_hf.hub.repo import SHARED_KWARGS, resolve_commit

# what else it takes to read a base's config
CONFIG_KWARGS = ("revision", "subfolder", "gguf_file", "trust_remote_code", "code_revision")


@dataclass(frozen=True)
class Request:
    """What `TransplantedForCausalLM.from_pretrained` was asked for: a recipient, and organs to put into it."""

    base: str | PreTrainedModel
    base_kwargs: dict[str, Any] = field(repr=False)  # with the token
    sources: list[OrganSource]
    named_by: str | None = None  # the donor that names the recipient, when the user does not

    @property
    def shared(self) -> dict[str, Any]:
        """How repos are reached, for base and donors alike."""
        return {key: value for key, value in self.base_kwargs.items() if key in SHARED_KWARGS}

    def base_config(self) -> PreTrainedConfig:
        """The native config of the recipient, without organs."""
        if isinstance(self.base, PreTrainedModel):
            return getattr(self.base, "base_config", self.base.config)
        given = {key: value for key, value in self.base_kwargs.items() if key in (*SHARED_KWARGS, *CONFIG_KWARGS)}
        config = self.base_kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            with reading_base(self.base, self.named_by):
                config = AutoConfig.from_pretrained(config or self.base, **given)
        if isinstance(config, DonorConfig):
            raise NotHFError(f"{self.base} is a donor, not a recipient; name the base first, then the donor")
        return config


def read_config(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> DonorConfig:
    """The config of a donor model, folder or Hub ID."""
    if isinstance(source.donor, DonorModel):
        return source.donor.config
    return DonorConfig.from_pretrained(
        source.donor, **{**hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
    )


def resolve_request(
    first: str | os.PathLike[str] | PreTrainedModel,
    donor: DonorSource | None,
    wish: OrganSource,
    config: PreTrainedConfig | None,
    base_kwargs: Mapping[str, Any],
) -> Request:
    """Tell base from donor in the forms that `TransplantedForCausalLM.from_pretrained` takes.

    Args:
        first: Its first argument: the recipient, or the donor repo when `donor` is `None`.
        donor: Its second argument.
        wish: Name, revision, subfolder and place that were asked for; its `donor` does not count.
        config: Config of the repo named first, if it was given.
        base_kwargs: The other keyword arguments.

    Raises:
        NotHFError: No donor is named, or a donor names no base.
        CorruptDonorError: A composition is not in order.
        OSError: A donor's config cannot be read.
    """
    if isinstance(first, nn.Module) and (not isinstance(first, PreTrainedModel) or has_adapters(first)):
        raise NotHFError(
            f"the recipient ({type(first).__name__}) has adapters or is wrapped; merge or unload them "
            "(merge_and_unload()), put the organ in, then put adapters on top"
        )
    kwargs = {key: value for key, value in base_kwargs.items() if key not in AUTO_KWARGS}
    shared = {key: value for key, value in kwargs.items() if key in SHARED_KWARGS}
    base: str | PreTrainedModel
    if donor is not None:
        if isinstance(first, PreTrainedModel) and (odd := sorted(kwargs.keys() - set(SHARED_KWARGS))):
            raise TypeError(f"{', '.join(odd)}: only for a recipient that is loaded here, this one is live")
        base = first if isinstance(first, PreTrainedModel) else os.fspath(first)
        if config is not None:
            kwargs["config"] = config
        if isinstance(base, str):
            kwargs["revision"] = resolve_commit(base, kwargs)
        wish = pin(replace(wish, donor=donor), shared)
        return Request(base, kwargs, expand(wish, read_config(wish, shared), shared))

    if isinstance(first, PreTrainedModel):
        raise NotHFError("name a donor to put into the live model: from_pretrained(model, donor)")
    wish = replace(
        wish,
        donor=os.fspath(first),
        revision=wish.revision or kwargs.pop("revision", None),
        subfolder=wish.subfolder or kwargs.pop("subfolder", None),
    )
    wish = pin(wish, shared)
    given = isinstance(config, DonorConfig)
    donor_config = config if isinstance(config, DonorConfig) else read_config(wish, shared)
    if donor_config.base_model_name_or_path is None:
        raise NotHFError(f"{wish.donor} does not name its base; give it: from_pretrained(base, {wish.donor!r})")
    if given and donor_config.donors is None:
        # AutoModelForCausalLM has moved those of its arguments that the donor's config also has into that config
        position, mode = place_in_force(wish, donor_config)
        wish = replace(wish, position=position, mode=mode, scale=scale_in_force(wish, donor_config))
    kwargs = {**implementations(donor_config), **kwargs}
    base = donor_config.base_model_name_or_path
    kwargs.pop("trust_remote_code", None)  # given for the repo that was named, not for the one that this one names
    kwargs["revision"] = resolve_commit(base, {**kwargs, "revision": donor_config.base_revision})
    if donor_config.base_subfolder:
        kwargs["subfolder"] = donor_config.base_subfolder
    return Request(base, kwargs, expand(wish, donor_config, shared), named_by=str(wish.donor))


def pin(source: OrganSource, hub_kwargs: Mapping[str, Any]) -> OrganSource:
    """The same organ with its revision resolved to a commit, so that all that is read of it is of one state."""
    if isinstance(source.donor, DonorModel):
        return source
    revision = resolve_commit(os.fspath(source.donor), {**hub_kwargs, "revision": source.revision})
    return replace(source, revision=revision)


def expand(source: OrganSource, config: DonorConfig, hub_kwargs: Mapping[str, Any]) -> list[OrganSource]:
    """The organs that a donor stands for: itself, or those that a composition lists.

    Args:
        source: Where the donor lies.
        config: Its config.
        hub_kwargs: How repos are reached.

    Raises:
        CorruptDonorError: The composition is not in order, or lists another composition or itself.
        NotHFError: It cannot be had as it was asked for.
        OSError: The config of an organ cannot be read.
    """
    if config.donors is None:
        return [source]
    organs = [pin(organ, hub_kwargs) for organ in read_entries(config, source)]
    moved = source.position is not None or source.mode is not None
    if source.name not in ("", DEFAULT_NAME):
        raise NotHFError(
            f"{source.donor} is a composition whose organs have their names; leave out the name {source.name!r}"
        )
    if moved or config.position is not None or config.mode != "insert":  # where AutoModelForCausalLM puts arguments
        raise NotHFError(
            f"{source.donor} is a composition whose organs have their places; load them one by one to move"
        )
    for organ in organs:
        try:
            listed = read_config(organ, hub_kwargs).donors
        except OSError as error:
            raise OSError(
                f"{source.donor} lists organ {organ.name!r} in {organ.donor}, which cannot be read: {one_line(error)}"
            ) from error
        if listed is not None:
            raise CorruptDonorError(
                f"{source.donor}: organ {organ.name!r} is a composition itself ({organ.donor}); "
                "compositions cannot be nested: list its organs"
            )
    return organs


def require_stack(organs: Sequence[tuple[OrganSource, DonorConfig]], recipient: PreTrainedConfig) -> list[Origin]:
    """The stack that the active ones of these organs make of a recipient, from configs alone.

    Args:
        organs: In load order, each with its config.
        recipient: Native config of a model without organs.

    Raises:
        NotHFError: A name is not plain.
        IncompatibleDonorError: With every mismatch of every organ, or the first overlap of two.
        CorruptDonorError: A donor's config contradicts itself.
    """
    if problems := stack_problems(organs, recipient):
        raise IncompatibleDonorError("; ".join(problems))
    return _stack(organs, recipient)


def stack_problems(organs: Sequence[tuple[OrganSource, DonorConfig]], recipient: PreTrainedConfig) -> list[str]:
    """Every mismatch of every organ with a recipient, or the first overlap of two. Arguments as in `require_stack`.

    Raises:
        NotHFError: A name is not plain.
        CorruptDonorError: A donor's config contradicts itself.
    """
    problems = []
    for source, config in organs:
        if not is_plain_name(source.name):
            raise NotHFError(
                f"donor_name {source.name!r} is not a plain name, without dots and slashes; choose another"
            )
        prefix = f"organ {source.name!r}: " if len(organs) > 1 else ""
        scale, mode = scale_in_force(source, config), source.mode or config.mode
        try:
            found = mismatches(config, recipient, source.position, source.mode)
        except NotHFError as error:
            raise type(error)(f"{prefix}{error}") from error
        found += [problem for problem in [scale_problem(scale, mode)] if problem]
        problems += [f"{prefix}{problem}" for problem in found]
    if not problems:
        try:
            _stack(organs, recipient)
        except IncompatibleDonorError as error:
            problems.append(str(error))
    return problems


def _stack(organs: Sequence[tuple[OrganSource, DonorConfig]], recipient: PreTrainedConfig) -> list[Origin]:
    places = [
        Place(source.name, *place_in_force(source, config), config.num_organ_layers)
        for source, config in organs
        if source.active
    ]
    return arrange(recipient.num_hidden_layers, places)


def place_in_force(source: OrganSource, config: DonorConfig) -> tuple[int, str]:
    """Position and mode of an organ: those asked for, else those of its own config."""
    position = config.position if source.position is None else source.position
    return int(position or 0), source.mode or config.mode


def scale_in_force(source: OrganSource, config: DonorConfig) -> float:
    """Scale of an organ: the one asked for, else its own config's."""
    return config.scale if source.scale is None else source.scale
