"""Several organs as one repo: a root config that lists them, and what it takes to load each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from not_hf.config import DonorConfig
from not_hf.donor import DonorModel
from not_hf.errors import CorruptDonorError

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


def located(hub_kwargs: Mapping[str, Any], revision: str | None, subfolder: str | None) -> dict[str, Any]:
    """Keyword arguments that read one folder of one revision of a repo."""
    return {**hub_kwargs, "revision": revision, "subfolder": subfolder or ""}


def read_config(donor: DonorSource, hub_kwargs: Mapping[str, Any]) -> DonorConfig:
    """The config of a donor model, folder or Hub ID."""
    if isinstance(donor, DonorModel):
        return donor.config
    return DonorConfig.from_pretrained(donor, **hub_kwargs)


def organ_sources(
    config: DonorConfig, donor: DonorSource, name: str, revision: str | None, subfolder: str | None
) -> Iterator[OrganSource]:
    """The organs that `donor` stands for: itself, or those a composition lists.

    Raises:
        CorruptDonorError: An entry of the composition is incomplete.
    """
    if config.donors is None:
        yield OrganSource(name, donor, revision, subfolder)
        return
    for entry in config.donors:
        place = {"position": entry.get("position"), "mode": entry.get("mode")}
        if "name" not in entry or not ("donor" in entry or "subfolder" in entry):
            raise CorruptDonorError(f"{donor}: an organ of the composition lacks a name or a place: {entry}")
        if "donor" in entry:
            yield OrganSource(entry["name"], entry["donor"], entry.get("revision"), entry.get("subfolder"), **place)
        else:
            inner = "/".join(part for part in (subfolder, entry["subfolder"]) if part)
            yield OrganSource(entry["name"], donor, revision, inner, **place)


def composition_config(configs: Mapping[str, DonorConfig]) -> DonorConfig:
    """The root config of a folder with one subfolder per organ, named like it."""
    first = next(iter(configs.values()))
    return DonorConfig(
        base_model_name_or_path=first.base_model_name_or_path,
        base_revision=first.base_revision,
        base_config=first.base_config,
        donors=[
            {"name": name, "subfolder": name, "position": config.position, "mode": config.mode}
            for name, config in configs.items()
        ],
    )
