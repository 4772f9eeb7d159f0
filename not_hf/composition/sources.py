"""The entries of a composition's `config.json`: which organs it lists, where they lie and where they go."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from transformers import PreTrainedConfig

from not_hf.composition.layout import is_plain_name, require_distinct
from not_hf.config import MODES, DonorConfig
from not_hf.donor.cutting import plain_config
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError

DEFAULT_NAME = "default"  # of an organ that nobody named, as in PEFT

DonorLike = str | os.PathLike[str] | DonorModel

# What an entry may say, and the types of JSON it says it in; null counts as left out.
_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "donor": (str,),  # a repo, when the organ is not in the composition's own
    "revision": (str,),  # of that repo
    "subfolder": (str,),  # of that repo if there is one, else of the composition
    "position": (int,),
    "mode": (str,),
    "scale": (int, float),
    "active": (bool,),
}


@dataclass(frozen=True)
class OrganSource:
    """Where one organ comes from and where it goes; `None` means: as its own config says.

    Args:
        name: Of the organ in the model.
        donor: Folder or Hub ID, or a live `DonorModel`.
        revision: Branch, tag or commit of the donor's repo.
        subfolder: Folder of the donor in its repo.
        position: Counts the recipient's own layers.
        mode: `"insert"` or `"replace"`.
        scale: Of what an inserted organ's layers write to the residual stream.
        active: Whether it stands in the stack after loading.
    """

    name: str
    donor: DonorLike
    revision: str | None = None
    subfolder: str | None = None
    position: int | None = None
    mode: str | None = None
    scale: float | None = None
    active: bool = True

    @property
    def is_local(self) -> bool:
        """Whether the donor is a folder on this machine."""
        return not isinstance(self.donor, DonorModel) and os.path.isdir(self.donor)


def read_entries(config: DonorConfig, composition: OrganSource) -> list[OrganSource]:
    """The organs that a composition lists.

    Args:
        config: Its root config.
        composition: Where that lies: folders without a repo of their own are in there.

    Raises:
        CorruptDonorError: An entry says something else than entries do, or contradicts itself or another.
    """
    where = composition.donor
    if not isinstance(config.donors, list) or not config.donors:
        raise CorruptDonorError(
            f"{where}: donors of a composition must be a list of organs, got {config.donors!r:.200}"
        )
    for entry in config.donors:
        if not isinstance(entry, dict) or not entry.get("name") or not (entry.get("donor") or entry.get("subfolder")):
            raise CorruptDonorError(f"{where}: an organ of the composition lacks a name or a place: {entry!r:.200}")
        if problem := _problem(entry):
            raise CorruptDonorError(f"{where}: organ {entry['name']!r:.200} of the composition {problem}")
    require_distinct([entry["name"] for entry in config.donors], f"{where}: ", CorruptDonorError)
    return [_source(entry, composition) for entry in config.donors]


def write_entry(name: str, config: DonorConfig, active: bool, **where: str | None) -> dict[str, Any]:
    """The entry of one organ.

    Args:
        name: Of the organ in the model.
        config: Of the organ; its `position`, `mode` and `scale` are those in force.
        active: Whether it stands in the stack after loading.
        **where: `subfolder` of the composition, or `donor` with its `revision` and `subfolder`.
    """
    place = {"position": config.position, "mode": config.mode, "scale": config.scale, "active": active}
    return {"name": name, **{key: value for key, value in where.items() if value}, **place}


def composition_config(
    base: str | None,
    base_revision: str | None,
    base_subfolder: str | None,
    base_config: PreTrainedConfig,
    entries: Sequence[dict[str, Any]],
) -> DonorConfig:
    """The root config of a composition.

    Args:
        base: Hub ID or folder of the recipient.
        base_revision: Its commit.
        base_subfolder: Folder of it within its repo.
        base_config: Its native config, without organs.
        entries: Of the organs, in load order.
    """
    return DonorConfig(
        base_model_name_or_path=base,
        base_revision=base_revision,
        base_subfolder=base_subfolder,
        base_config=plain_config(base_config),
        donors=list(entries),
    )


def _problem(entry: dict[str, Any]) -> str | None:
    """What is wrong with one entry, `None` if nothing is."""
    for key, value in entry.items():
        if key not in _ENTRY_TYPES:
            return f"has an unknown key {key!r:.200}; known are {', '.join(_ENTRY_TYPES)}"
        if value is not None and type(value) not in _ENTRY_TYPES[key]:  # strictly: true is no integer
            kinds = " or ".join(kind.__name__ for kind in _ENTRY_TYPES[key])
            return f"has {key} {value!r:.200}, which must be {kinds}"
    if not is_plain_name(entry["name"]):
        return "is not called by a plain name: it must be without dots and slashes"
    if entry.get("mode") not in (None, *MODES):
        return f"has mode {entry['mode']!r:.200}, which must be one of {MODES}"
    if (scale := entry.get("scale")) is not None and not math.isfinite(scale):
        return f"has scale {scale}, which must be a finite number"
    path = PurePosixPath(entry.get("subfolder") or "")
    if path.is_absolute() or ".." in path.parts or "\\" in str(path) or not (path.parts or entry.get("donor")):
        return f"has subfolder {entry['subfolder']!r:.200}, which leads out of its repo or to the composition itself"
    if entry.get("revision") and not entry.get("donor"):
        return "has a revision but no donor: what lies beside config.json is of one commit with it"
    return None


def _source(entry: dict[str, Any], composition: OrganSource) -> OrganSource:
    """Where the organ of a checked entry lies."""
    active = entry.get("active") is not False
    place = (entry.get("position"), entry.get("mode"), entry.get("scale"), active)
    if donor := entry.get("donor"):
        return OrganSource(entry["name"], donor, entry.get("revision"), entry.get("subfolder"), *place)
    inner = "/".join(part for part in (composition.subfolder, entry["subfolder"]) if part)
    return OrganSource(entry["name"], composition.donor, composition.revision, inner, *place)
