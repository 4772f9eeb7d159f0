"""Licences: a donor inherits the licence on the card of its base."""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from huggingface_hub.errors import HTTPError

from not_hf.architecture.upstream import commit_of, fetch_file
from not_hf.cards.common import README, hub_id, read_metadata, unite
from not_hf.errors import one_line

if TYPE_CHECKING:
    from not_hf.config import DonorConfig

logger = logging.getLogger(__name__)


class License(NamedTuple):
    """A licence, in the terms of cards and configs."""

    license: str | list[str] | None = None  # the Hub's identifiers
    license_name: str | None = None  # of a licence that the Hub calls `other`
    license_link: str | None = None

    @classmethod
    def of(cls, config: DonorConfig) -> License:
        """Read the licence from a donor's config."""
        return cls(config.license, config.license_name, config.license_link)

    def set(self, config: DonorConfig) -> None:
        """Write the licence into a donor's config."""
        config.license, config.license_name, config.license_link = self

    @property
    def is_other(self) -> bool:
        """Whether it is `other`, or one of several is: only then a card has a name and a link."""
        return "other" in unite(self.license)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata for a card."""
        return self._asdict() if self.is_other else {"license": self.license}


def base_license(base: str, **hub_kwargs: Any) -> License:
    """Read the licence from the card of a folder or Hub ID; unknown if there is no readable card."""
    if not (os.path.isdir(base) or hub_id(base)):
        return License()
    hub_kwargs.pop("subfolder", None)  # the card of a repo is at its root
    try:
        path = fetch_file(base, README, **hub_kwargs)
        card = read_metadata(path) if path else {}
    except (OSError, ValueError, HTTPError, yaml.YAMLError) as error:
        reason = one_line(error, 200)
        logger.warning("the licence of %s is unknown, since its card cannot be read: %s", base, reason)
        return License()
    license = card.get("license")
    if not license or not all(isinstance(name, str) for name in (license if isinstance(license, list) else [license])):
        return License()
    if not License(license).is_other:
        return License(license)
    name, link = (text if isinstance(text := card.get(f"license_{key}"), str) else None for key in ("name", "link"))
    return License(license, name, link and _absolute(link, base, hub_kwargs.get("revision")))


def organ_license(config: DonorConfig, **hub_kwargs: Any) -> License:
    """Return the licence in a donor's config, which holds one organ, else that of its base."""
    if config.license is None and config.base_model_name_or_path:
        return base_license(config.base_model_name_or_path, **hub_kwargs)
    return License.of(config)


def inherit_license(config: DonorConfig, **hub_kwargs: Any) -> None:
    """Write `organ_license` into a donor's config."""
    organ_license(config, **hub_kwargs).set(config)


@contextlib.contextmanager
def inherited_licenses(configs: Sequence[DonorConfig], token: bool | str | None) -> Iterator[None]:
    """Write `organ_license` into the configs of donors; they are as before if the block fails."""
    before = [License.of(config) for config in configs]
    try:
        for config in configs:
            inherit_license(config, revision=config.base_revision, token=token)
        yield
    except BaseException:
        for config, license in zip(configs, before, strict=True):
            license.set(config)
        raise


def joint_license(parts: Iterable[License]) -> License:
    """Combine licences; the result is unknown if one of several different ones is.

    Those that the Hub calls `other` keep their names, as in `a-and-b`: it takes one name, without commas and spaces. A
    card has room for one link, so that of several such licences is left out.
    """
    parts = list(parts)
    if all(part == parts[0] for part in parts):
        return parts[0]
    if any(part.license is None for part in parts):
        return License()
    ids = unite(*(part.license for part in parts))
    others = [part for part in parts if part.is_other]
    names, links = (unite(*(getattr(part, key) for part in others)) for key in ("license_name", "license_link"))
    if any(part.license_name is None for part in others):  # a name would seem to be that of all
        names = []
    link = links[0] if links and len(names) == 1 else None
    return License(ids if len(ids) > 1 else ids[0], "-and-".join(names) or None, link)


def _absolute(link: str, base: str, revision: str | None) -> str | None:
    """Make a link work from other repos; `None` if it leads into a local folder."""
    if "://" in link:
        return link
    if os.path.isdir(base):
        return None
    commit = commit_of(revision) or revision or "main"
    return f"https://huggingface.co/{base}/blob/{commit}/{posixpath.normpath(link)}"
