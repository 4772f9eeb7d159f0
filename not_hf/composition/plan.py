"""Compositions without weights: `compose` plans one from the names of donors, the plan writes it to a folder."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import model_info
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from not_hf.architecture.upstream import commit_of, fetch_file, require_known, resolve_commit
from not_hf.cards.common import README
from not_hf.cards.donor import updated_card
from not_hf.cards.license import License, joint_license
from not_hf.composition.check import header_problems, validate
from not_hf.composition.layout import StackEntry, require_distinct
from not_hf.composition.resolve import ResolvedOrgan, read_base_config, resolve_donor
from not_hf.composition.sources import OrganSource, composition_config, write_entry
from not_hf.config import DonorConfig
from not_hf.donor.loading import refuse
from not_hf.donor.modeling import DonorModel
from not_hf.donor.tokenizer import save_local_tokenizer
from not_hf.errors import NotHFError, reaching_hub
from not_hf.hub.atomic_write import replacing, require_donor_folder
from not_hf.hub.checkpoint import checkpoint_files, open_checkpoint
from not_hf.hub.partial_download import list_tensors


@dataclass(frozen=True)
class PlannedOrgan:
    """One organ of a plan."""

    source: OrganSource  # its revision is a commit, `None` for a folder
    config: DonorConfig  # position, mode and scale are those in force
    num_parameters: int
    size: int  # of its weights, in bytes

    @property
    def name(self) -> str:
        """What it is called in the model."""
        return self.source.name


@dataclass(frozen=True)
class Plan:
    """A checked composition that is not written yet.

    Args:
        base: The recipient.
        base_revision: Its commit, `None` for a folder.
        base_subfolder: Folder of it within its repo.
        base_config: Its native config.
        organs: In load order.
        stack: The layers of the model that it makes, front to back, with the active organs in it.
        hub_kwargs: How repos are reached.
    """

    base: str
    base_revision: str | None
    base_subfolder: str | None
    base_config: PreTrainedConfig
    organs: Sequence[PlannedOrgan]
    stack: Sequence[StackEntry]
    hub_kwargs: Mapping[str, Any] = field(repr=False)  # with the token

    def config(self, embed: bool = False) -> DonorConfig:
        """The root config of the composition; `embed` as in `save_pretrained`."""
        entries = []
        for organ in self.organs:
            source = organ.source
            where = {"donor": str(source.donor), "revision": source.revision, "subfolder": source.subfolder}
            if embed or source.is_local:
                where = {"subfolder": organ.name}
            entries.append(write_entry(organ.name, organ.config, source.active, **where))
        config = composition_config(self.base, self.base_revision, self.base_subfolder, self.base_config, entries)
        joint_license(License.of(organ.config) for organ in self.organs).set(config)
        return config

    def save_pretrained(self, folder: str | os.PathLike[str], embed: bool = False) -> None:
        """Write the composition: its config, its card, and the organs that it does not only refer to.

        Args:
            folder: Created when missing. A donor that is there is written over.
            embed: Copy donors from the Hub into the folder too. Otherwise they are listed by reference, pinned to
                their commits; local donors are always copied, since a path means nothing on another machine.

        Raises:
            NotHFError: The folder holds another model. Whatever is raised, the folder stays as it was.
            CorruptDonorError: The weights of an organ that is to be copied are off.
            OSError: They cannot be fetched.
        """
        copied = [organ for organ in self.organs if embed or organ.source.is_local]
        places = {organ.name: Path(folder, organ.name) for organ in copied}
        for place in (Path(folder), *places.values()):
            require_donor_folder(place)
        files = {organ.name: self._files(organ.source) for organ in copied}
        config = self.config(embed)
        card = updated_card(
            folder,
            config,
            sum(organ.num_parameters for organ in self.organs),
            sum(organ.size for organ in self.organs),
        )
        with replacing(folder) as draft:
            for name, paths in files.items():
                Path(draft, name).mkdir()
                for file, path in paths.items():
                    shutil.copyfile(path, Path(draft, name, file))
            config.save_pretrained(draft)
            card.save(Path(draft, README))
            save_local_tokenizer(self.base, folder, draft)

    def _files(self, source: OrganSource) -> dict[str, str]:
        """The files of a donor, whole and on this machine: paths by name."""
        donor = str(source.donor)
        where: dict[str, Any] = {**self.hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
        open_checkpoint(donor, **where)  # raises if they are not whole
        files = checkpoint_files(donor, **where)
        for name in (CONFIG_NAME, README):
            path = fetch_file(donor, name, **where)
            files |= {name: path} if path else {}
        return files


def compose(
    donors: Sequence[str | os.PathLike[str] | OrganSource],
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    **hub_kwargs: Any,
) -> Plan:
    """Plan a composition from the names of donors. Configs and headers are read, no weights; nothing is written.

        compose(["me/gpt2-kjv", OrganSource("law", "me/gpt2-law", position=8, mode="replace")]).save_pretrained("both")

    Args:
        donors: Folders, Hub IDs, or `OrganSource`s that say more: in load order. An organ with an empty name, and
            one given by its ID alone, is named after its repo. A donor that is a composition stands for its organs.
        base: Folder or Hub ID of the recipient; `None`: the base that all donors name.
        base_revision: Branch, tag or commit of it.
        **hub_kwargs: `token`, `cache_dir`, `force_download`, `local_files_only`, for base and donors.

    Raises:
        IncompatibleDonorError: With every mismatch of every organ, or the overlap of two.
        CorruptDonorError: A donor contradicts itself.
        NotHFError: Names are not distinct, or the donors do not agree on a base.
        OSError: A repo cannot be read.
    """
    require_known(hub_kwargs)
    wishes = [_wish(donor) for donor in ([donors] if isinstance(donors, str) else donors)]
    if not wishes:
        raise NotHFError("name at least one donor to compose")
    read = [(wish, *resolve_donor(wish, hub_kwargs)) for wish in wishes]
    base_subfolder = None
    if base is None:
        base, base_revision, base_subfolder = _common_base([(wish, config) for wish, config, _ in read], base_revision)
    else:
        _require_repo(base, base_revision)
    organs = [organ for wish, config, found in read for organ in _named(wish, config, found, hub_kwargs)]
    require_distinct([organ.name for organ in organs])

    base = os.fspath(base)
    revision = resolve_commit(base, {**hub_kwargs, "revision": base_revision})
    where = {**hub_kwargs, "revision": revision, "subfolder": base_subfolder or ""}
    base_config, _ = read_base_config(base, None, where)
    stack = validate(organs, base_config).stack
    planned = [_planned(organ, hub_kwargs) for organ in organs]
    return Plan(base, _commit(base, revision, hub_kwargs), base_subfolder, base_config, planned, stack, hub_kwargs)


def _planned(organ: ResolvedOrgan, hub_kwargs: Mapping[str, Any]) -> PlannedOrgan:
    """An organ whose headers were found to be in order."""
    source, config = organ.source, copy.copy(organ.spec.config)
    config.position, config.mode, config.scale = int(organ.place.position), organ.place.mode, organ.scale
    where = {"revision": source.revision, "subfolder": source.subfolder or ""}
    tensors = list_tensors(str(source.donor), **hub_kwargs, **where)
    refuse(str(source.donor), header_problems(organ.spec, tensors))
    sizes = [tensor.data_offsets[1] - tensor.data_offsets[0] for tensor in tensors.values()]
    num_parameters = sum(tensor.parameter_count for tensor in tensors.values())
    return PlannedOrgan(source, config, num_parameters, sum(sizes))


def _wish(donor: str | os.PathLike[str] | OrganSource) -> OrganSource:
    """A donor as it was asked for."""
    wish = donor if isinstance(donor, OrganSource) else OrganSource("", donor)
    if isinstance(wish.donor, DonorModel):
        raise NotHFError("compose takes donors by name; save the DonorModel first, then give its folder")
    _require_repo(wish.donor, wish.revision)
    return replace(wish, donor=os.fspath(wish.donor))


def _require_repo(name: str | os.PathLike[str], revision: str | None) -> None:
    """Refuse a revision of a folder, which would be ignored."""
    if revision is not None and os.path.isdir(name):
        raise NotHFError(f"{name} is a folder and has no revision {revision!r}; leave it out, or name a repo")


def _named(
    wish: OrganSource, config: DonorConfig, organs: Sequence[ResolvedOrgan], hub_kwargs: Mapping[str, Any]
) -> Iterator[ResolvedOrgan]:
    """The organs that a donor stands for, each with a name and its commit."""
    if config.donors is not None and (wish.name or not wish.active):
        raise NotHFError(
            f"{wish.donor} is a composition whose organs have their names; give its organs one by one to change that"
        )
    for organ in organs:
        source = organ.source
        last = os.path.basename(os.path.abspath(source.subfolder or str(source.donor)))
        name = source.name or re.sub(r"[^\w-]", "-", last)
        commit = _commit(str(source.donor), source.revision, hub_kwargs)
        yield replace(organ, source=replace(source, name=name, revision=commit))


def _common_base(
    donors: Sequence[tuple[OrganSource, DonorConfig]], revision: str | None
) -> tuple[str, str | None, str | None]:
    """The base that all donors name, the commit that all of them name unless another is given, and its subfolder."""
    names = {(config.base_model_name_or_path, config.base_subfolder): source.donor for source, config in donors}
    ((name, subfolder), *others) = names
    if name is None or others:
        said = ", ".join(f"{donor} {'/'.join(filter(None, base)) or 'none'}" for base, donor in names.items())
        raise NotHFError(f"the donors do not name one base ({said}); give it: compose(donors, base)")
    revisions = sorted({config.base_revision for _, config in donors if config.base_revision})
    if revision is None and len(revisions) > 1:
        raise NotHFError(
            f"the donors name different commits of {name} ({', '.join(revisions)}); give base_revision to choose one"
        )
    return name, revision or (revisions[0] if revisions else None), subfolder


def _commit(name: str, revision: str | None, hub_kwargs: Mapping[str, Any]) -> str | None:
    """The commit that a resolved revision stands for; `None` for a folder.

    Raises:
        OSError: It could not be resolved.
    """
    if os.path.isdir(name):
        return None
    # what is in the cache can be read where the Hub refuses to answer: ask it again, to hear why
    with reaching_hub(f"{name} cannot be read"):
        return commit_of(revision) or model_info(name, revision=revision, token=hub_kwargs.get("token")).sha
