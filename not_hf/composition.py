"""Which repos a call means: a base and a donor, a donor that names its base, a composition of several organs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from not_hf.config import DonorConfig
from not_hf.cutting import HUB_KWARGS, resolve_commit
from not_hf.donor import DonorModel
from not_hf.errors import CorruptDonorError, NotHFError

# how a repo is reached; its revision and its subfolder are its own
SHARED_KWARGS = tuple(key for key in HUB_KWARGS if key not in ("revision", "subfolder"))
# what else it takes to read a base's config
CONFIG_KWARGS = ("revision", "subfolder", "gguf_file", "trust_remote_code", "code_revision")
# what AutoModelForCausalLM and pipelines add for the repo named first, which is not the base
AUTO_KWARGS = ("_from_auto", "_from_pipeline", "adapter_kwargs")

DonorSource = str | os.PathLike[str] | DonorModel


@dataclass(frozen=True)
class OrganSource:
    """Where one organ comes from and where it goes; `None` means: as its own config says."""

    name: str
    donor: DonorSource
    revision: str | None = None
    subfolder: str | None = None
    position: int | None = None
    mode: str | None = None
    active: bool = True


@dataclass(frozen=True)
class Request:
    """What `TransplantedForCausalLM.from_pretrained` was asked for: a recipient, and organs to put into it."""

    base: str | PreTrainedModel
    base_kwargs: dict[str, Any]
    sources: list[OrganSource]
    named_by: str | None = None  # the donor that names the recipient, when the user does not

    @property
    def shared(self) -> dict[str, Any]:
        """How repos are reached, for base and donors alike."""
        return {key: value for key, value in self.base_kwargs.items() if key in SHARED_KWARGS}

    def base_config(self) -> PreTrainedConfig:
        """The native config of a recipient that is still to be loaded."""
        given = {key: value for key, value in self.base_kwargs.items() if key in (*SHARED_KWARGS, *CONFIG_KWARGS)}
        config = self.base_kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config or str(self.base), **given)
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
        CorruptDonorError: A composition is incomplete.
        OSError: The donor's config cannot be read.
    """
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
        wish = replace(wish, donor=donor)
        return Request(base, kwargs, list(_organs(wish, read_config(wish, shared))))

    if isinstance(first, PreTrainedModel):
        raise NotHFError("name a donor to put into the live model: from_pretrained(model, donor)")
    wish = replace(
        wish,
        donor=os.fspath(first),
        revision=wish.revision or kwargs.pop("revision", None),
        subfolder=wish.subfolder or kwargs.pop("subfolder", None),
    )
    given = isinstance(config, DonorConfig)
    donor_config = config if isinstance(config, DonorConfig) else read_config(wish, shared)
    if donor_config.base_model_name_or_path is None:
        raise NotHFError(f"{wish.donor} does not name its base; give it: from_pretrained(base, {wish.donor!r})")
    if given and donor_config.donors is None:
        # AutoModelForCausalLM has moved those of its arguments that the donor's config also has into that config
        place = (donor_config.position, donor_config.mode)
        wish = replace(wish, position=place[0] if wish.position is None else wish.position, mode=wish.mode or place[1])
    for key in ("attn_implementation", "experts_implementation"):
        if (value := getattr(donor_config, f"_{key}")) is not None:
            kwargs.setdefault(key, value)
    base = donor_config.base_model_name_or_path
    kwargs.pop("trust_remote_code", None)  # given for the repo that was named, not for the one that this one names
    kwargs["revision"] = resolve_commit(base, {**kwargs, "revision": donor_config.base_revision})
    return Request(base, kwargs, list(_organs(wish, donor_config)), named_by=str(wish.donor))


def _organs(wish: OrganSource, config: DonorConfig) -> Iterator[OrganSource]:
    """The organs a donor stands for: itself, or those a composition lists."""
    if config.donors is None:
        yield wish
        return
    if wish.position is not None or wish.mode is not None:
        raise NotHFError(f"{wish.donor} is a composition whose organs have their places; load them one by one to move")
    if not isinstance(config.donors, list):
        raise CorruptDonorError(f"{wish.donor}: donors of a composition must be a list, got {config.donors!r}")
    for entry in config.donors:
        if not isinstance(entry, dict) or "name" not in entry or not ("donor" in entry or "subfolder" in entry):
            raise CorruptDonorError(f"{wish.donor}: an organ of the composition lacks a name or a place: {entry}")
        place = (entry.get("position"), entry.get("mode"), bool(entry.get("active", True)))
        if "donor" in entry:
            yield OrganSource(entry["name"], entry["donor"], entry.get("revision"), entry.get("subfolder"), *place)
        else:
            inner = "/".join(part for part in (wish.subfolder, entry["subfolder"]) if part)
            yield OrganSource(entry["name"], wish.donor, wish.revision, inner, *place)


def composition_config(organs: Mapping[str, tuple[DonorConfig, bool]]) -> DonorConfig:
    """The root config of a folder with one subfolder per organ, named like it.

    Args:
        organs: Config of each organ by name, and whether it is active.
    """
    first, _ = next(iter(organs.values()))
    return DonorConfig(
        base_model_name_or_path=first.base_model_name_or_path,
        base_revision=first.base_revision,
        base_config=first.base_config,
        donors=[
            {
                "name": name,
                "subfolder": name,
                "position": config.position,
                "mode": config.mode,
                "scale": 1.0,
                "active": active,
            }
            for name, (config, active) in organs.items()
        ],
    )
