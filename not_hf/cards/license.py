"""The licence of a base, as its card states it: what is cut from the base inherits it."""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.errors import HTTPError

from not_hf.architecture.upstream import commit_of, fetch_file
from not_hf.cards.common import README, hub_id, unite
from not_hf.errors import one_line

if TYPE_CHECKING:
    from not_hf.config import DonorConfig

# what a card that cannot be fetched or parsed raises
_UNREADABLE = (OSError, ValueError, HTTPError, yaml.YAMLError)

logger = logging.getLogger(__name__)


class License(NamedTuple):
    """A licence in the words of cards: the Hub's identifiers of it, and what `other` stands for."""

    id: str | list[str] | None = None
    name: str | None = None
    link: str | None = None

    @classmethod
    def of(cls, config: DonorConfig) -> License:
        """The one that an organ's config states."""
        return cls(config.license, config.license_name, config.license_link)

    def set(self, config: DonorConfig) -> None:
        """State it in an organ's config."""
        config.license, config.license_name, config.license_link = self

    def metadata(self) -> dict[str, Any]:
        """What a card says; a name and a link stand only beside `other`."""
        named = {"license_name": self.name, "license_link": self.link}
        return {"license": self.id, **(named if self.id == "other" else {})}


def base_license(base: str, **hub_kwargs: Any) -> License:
    """What a model's card says about its licence. No card, or one that cannot be read, says nothing.

    Args:
        base: Folder or Hub ID.
        **hub_kwargs: As in `from_pretrained`. With `local_files_only=True` the network is not asked.
    """
    if not (os.path.isdir(base) or hub_id(base)):
        return License()
    at_root = {key: value for key, value in hub_kwargs.items() if key != "subfolder"}  # where a repo's card is
    try:
        path = fetch_file(base, README, **at_root)
        stated = (metadata_load(path) if path else None) or {}
    except _UNREADABLE as error:
        reason = one_line(error, 200)
        logger.warning("the licence of %s is unknown, since its card cannot be read: %s", base, reason)
        return License()
    identifier = stated.get("license")
    listed = identifier if isinstance(identifier, list) else [identifier]
    if not listed or not all(isinstance(item, str) for item in listed):
        return License()
    if identifier != "other":
        return License(identifier)
    name, link = (text if isinstance(text := stated.get(f"license_{key}"), str) else None for key in ("name", "link"))
    return License(identifier, name, _absolute(link, base, hub_kwargs.get("revision")))


def organ_license(config: DonorConfig, **hub_kwargs: Any) -> License:
    """The licence that an organ's config states, else its base's. Arguments as in `base_license`.

    The organs of a composition need not be of its base: it has the licence that its config states, or none.
    """
    if config.license is None and config.donors is None and config.base_model_name_or_path:
        return base_license(config.base_model_name_or_path, **hub_kwargs)
    return License.of(config)


def inherit_license(config: DonorConfig, **hub_kwargs: Any) -> None:
    """Fill in the base's licence where an organ's config states none. Arguments as in `base_license`."""
    organ_license(config, **hub_kwargs).set(config)


def joint_license(parts: Iterable[License]) -> License:
    """The licence of what is made of several parts: those of all of them; unknown when one is."""
    first, *others = parts
    if all(other == first for other in others):
        return first
    if any(part.id is None for part in (first, *others)):
        return License()
    ids = unite(first.id, *(other.id for other in others))
    return License(ids if len(ids) > 1 else ids[0])


def _absolute(link: str | None, base: str, revision: str | None) -> str | None:
    """A link that leads somewhere from another repo too; `None` for one into a local folder."""
    if link is None or "://" in link:
        return link
    if os.path.isdir(base):
        return None
    commit = commit_of(revision) or revision or "main"
    return f"https://huggingface.co/{base}/blob/{commit}/{posixpath.normpath(link)}"
