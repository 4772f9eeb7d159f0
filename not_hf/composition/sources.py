"""Sources of organs, and the entries of a composition's `config.json` that list them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from transformers import PreTrainedConfig

from not_hf.cards.license import License, joint_license
from not_hf.composition.layout import is_plain_name, require_distinct
from not_hf.config import MODES, DonorConfig
from not_hf.donor.cutting import plain_config
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError
from not_hf.limits import MAX_ORGANS, require_few

DEFAULT_NAME = "default"  # of an organ, as in PEFT

DonorLike = str | os.PathLike[str] | DonorModel

# Keys of an entry and the types of their values; null means absent.
_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "donor": (str,),  # a repo other than the composition's
    "revision": (str,),  # of that repo
    "subfolder": (str,),  # of that repo, or of the composition
    "position": (int,),
    "mode": (str,),
    "scale": (int, float),
    "active": (bool,),
}


@dataclass(frozen=True)
class OrganSource:
    """A donor to load, and the name and place of its organ in the recipient.

    Args:
        name: Name of the organ in the model.
        donor: Folder, Hub ID or `DonorModel`.
        revision: Branch, tag or commit of the donor's repo.
        subfolder: Folder of the donor in its repo.
        position: Position among the recipient's own layers; default: the donor's. `"best"`: where a sweep found it
            best, as `PositionSweep.record` noted it in the donor's config.
        mode: `"insert"` or `"replace"`; default: the donor's.
        scale: Factor of an inserted organ's contribution to the residual stream, or of what a replacement changes;
            default: the donor's.
        active: Whether the organ is active after loading.

    Examples:
        >>> from not_hf import OrganSource
        >>> law = OrganSource("law", "me/gpt2-law", position=8, mode="replace")  # for `compose`
        >>> law.position, law.scale, law.is_local
        (8, None, False)
    """

    name: str
    donor: DonorLike
    revision: str | None = None
    subfolder: str | None = None
    position: int | str | None = None
    mode: str | None = None
    scale: float | None = None
    active: bool = True

    @property
    def is_local(self) -> bool:
        """Whether the donor is a folder on this machine."""
        return not isinstance(self.donor, DonorModel) and os.path.isdir(self.donor)


def read_entries(config: DonorConfig, composition: OrganSource) -> list[OrganSource]:
    """Read the organs that a composition's root config lists.

    Raises:
        CorruptDonorError: An entry is malformed, or contradicts itself or another.
    """
    where = composition.donor
    if not isinstance(config.donors, list) or not config.donors:
        raise CorruptDonorError(
            f"{where}: donors of a composition must be a list of organs, got {config.donors!r:.200}"
        )
    require_few(f"{where}: donors", config.donors, MAX_ORGANS)
    for entry in config.donors:
        if not isinstance(entry, dict) or not entry.get("name") or not (entry.get("donor") or entry.get("subfolder")):
            raise CorruptDonorError(
                f"{where}: an organ of the composition needs a name, and a donor or subfolder, got {entry!r:.200}"
            )
        if problem := _problem(entry):
            raise CorruptDonorError(f"{where}: organ {entry['name']!r:.200} of the composition {problem}")
    require_distinct([entry["name"] for entry in config.donors], f"{where}: ", CorruptDonorError)
    return [_source(entry, composition) for entry in config.donors]


def write_entry(name: str, config: DonorConfig, active: bool, **where: str | None) -> dict[str, Any]:
    """Make the entry of an organ; `where` is its `subfolder`, or its `donor`, `revision` and `subfolder`."""
    place = {"position": config.position, "mode": config.mode, "scale": config.scale, "active": active}
    return {"name": name, **{key: value for key, value in where.items() if value}, **place}


def composition_config(
    base: str | None,
    base_revision: str | None,
    base_subfolder: str | None,
    base_config: PreTrainedConfig,
    entries: Sequence[dict[str, Any]],
    licenses: Iterable[License],
) -> DonorConfig:
    """Make the root config of a composition from its recipient, and the entries and licences of its organs."""
    return DonorConfig(
        base_model_name_or_path=base,
        base_revision=base_revision,
        base_subfolder=base_subfolder,
        base_config=plain_config(base_config),
        donors=list(entries),
        architectures=[DonorModel.__name__],  # as in a donor's config; TRL reads it
        **joint_license(licenses)._asdict(),
    )


def _problem(entry: dict[str, Any]) -> str | None:
    """Describe what is wrong with an entry, if anything."""
    for key, value in entry.items():
        if key not in _ENTRY_TYPES:
            return f"has an unknown key {key!r:.200}; known are {', '.join(_ENTRY_TYPES)}"
        if value is not None and type(value) not in _ENTRY_TYPES[key]:  # not isinstance: true is no integer
            kinds = " or ".join(kind.__name__ for kind in _ENTRY_TYPES[key])
            return f"has {key} {value!r:.200}, which must be {kinds}"
    if not is_plain_name(entry["name"]):
        return "must have a plain name, without dots and slashes"
    if entry.get("mode") not in (None, *MODES):
        return f"has mode {entry['mode']!r:.200}, which must be one of {MODES}"
    if (scale := entry.get("scale")) is not None and not abs(scale) <= sys.float_info.max:
        return f"has scale {scale!r:.100}, which must be a finite number"
    path = PurePosixPath(entry.get("subfolder") or "")
    if path.is_absolute() or ".." in path.parts or "\\" in str(path) or not (path.parts or entry.get("donor")):
        return f"has subfolder {entry['subfolder']!r:.200}, which leads out of its repo or to the composition itself"
    if entry.get("revision") and not entry.get("donor"):
        return "has a revision but no donor; leave it out, since a subfolder has the commit of the composition"
    return None


def _source(entry: dict[str, Any], composition: OrganSource) -> OrganSource:
    """Make the source of a checked entry."""
    active = entry.get("active") is not False
    place = (entry.get("position"), entry.get("mode"), entry.get("scale"), active)
    if donor := entry.get("donor"):
        return OrganSource(entry["name"], donor, entry.get("revision"), entry.get("subfolder"), *place)
    inner = "/".join(part for part in (composition.subfolder, entry["subfolder"]) if part)
    return OrganSource(entry["name"], composition.donor, composition.revision, inner, *place)
