"""Compose donors by name, without weights: `compose` makes a plan, which writes the composition to a folder."""

from __future__ import annotations

import copy
import math
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

from not_hf.architecture.stack import layers_config
from not_hf.architecture.upstream import commit_of, fetch_file, require_known, resolve_commit
from not_hf.cards.common import README
from not_hf.cards.description import as_html, describe_organ
from not_hf.cards.donor import updated_card
from not_hf.cards.license import License
from not_hf.composition.check import header_problems, validate
from not_hf.composition.layout import StackEntry, require_distinct
from not_hf.composition.resolve import ResolvedOrgan, read_base_config, resolve_donor
from not_hf.composition.sources import OrganSource, composition_config, write_entry
from not_hf.config import DonorConfig
from not_hf.donor.delta import assembled
from not_hf.donor.loading import refuse
from not_hf.donor.modeling import DonorModel
from not_hf.donor.tokenizer import save_local_tokenizer
from not_hf.errors import NotHFError, megabytes, reaching_hub
from not_hf.hub.atomic_write import replacing, require_donor_folder
from not_hf.hub.checkpoint import checkpoint_files, open_checkpoint
from not_hf.hub.consistent_read import saved_digests
from not_hf.hub.digest import digest_problems
from not_hf.hub.headers import size_of
from not_hf.hub.partial_download import list_tensors


@dataclass(frozen=True)
class PlannedOrgan:
    """One organ of a plan."""

    source: OrganSource  # with a commit as revision, `None` for a folder
    config: DonorConfig  # with the position, mode and scale of the plan
    num_parameters: int
    size: int  # of its weights in bytes

    @property
    def name(self) -> str:
        """Name in the model."""
        return self.source.name


@dataclass(frozen=True)
class Plan:
    """A checked composition, to be written by `save_pretrained`.

    Args:
        base: Folder or Hub ID of the recipient.
        base_revision: Its commit, `None` for a folder.
        base_subfolder: Its folder within the repo.
        base_config: Its native config.
        organs: Organs in load order.
        stack: Layers of the recipient with its active organs, front to back.
        hub_kwargs: `token`, `cache_dir`, …
    """

    base: str
    base_revision: str | None
    base_subfolder: str | None
    base_config: PreTrainedConfig
    organs: Sequence[PlannedOrgan]
    stack: Sequence[StackEntry]
    hub_kwargs: Mapping[str, Any] = field(repr=False)  # with the token

    def __repr__(self) -> str:
        lines = [
            f"composition for {self.base}: {self.base_config.num_hidden_layers} layers, {len(self.stack)} with organs"
        ]
        for organ in self.organs:
            size = f"{organ.num_parameters:,} parameters, {megabytes(organ.size)}"
            lines.append(f"  {organ.name}: {describe_organ(organ.config)}; {size}; from {organ.source.donor}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return as_html({organ.name: organ.config for organ in self.organs})

    def config(self, embed: bool = False) -> DonorConfig:
        """Make the root config; `embed` as in `save_pretrained`."""
        entries = []
        for organ in self.organs:
            source = organ.source
            where = {"donor": str(source.donor), "revision": source.revision, "subfolder": source.subfolder}
            if embed or source.is_local:
                where = {"subfolder": organ.name}
            entries.append(write_entry(organ.name, organ.config, source.active, **where))
        licenses = (License.of(organ.config) for organ in self.organs)
        base = (self.base, self.base_revision, self.base_subfolder, self.base_config)
        return composition_config(*base, entries, licenses)

    def save_pretrained(self, folder: str | os.PathLike[str], embed: bool = False) -> None:
        """Write the composition: its config, its card, and copies of local donors.

        Args:
            folder: Folder; created if missing. A donor in it is overwritten.
            embed: Also copy donors from the Hub. Otherwise they are listed by ID and commit.

        Raises:
            NotHFError: The folder holds another model. As with any error, the folder is unchanged.
            CorruptDonorError: The weights of a copied donor are damaged.
            OSError: They cannot be fetched.
        """
        copied = {organ.name: organ.source for organ in self.organs if embed or organ.source.is_local}
        for place in (Path(folder), *(Path(folder, name) for name in copied)):
            require_donor_folder(place)
        files = {organ.name: self._files(organ) for organ in self.organs if organ.name in copied}
        config = self.config(embed)
        num_parameters = sum(organ.num_parameters for organ in self.organs)
        card = updated_card(folder, config, num_parameters, sum(organ.size for organ in self.organs))
        digests: dict[str, str] = {}
        with replacing(folder) as draft:
            for name, paths in files.items():
                Path(draft, name).mkdir()
                for file, path in paths.items():
                    shutil.copyfile(path, Path(draft, name, file))
                copied_digests = saved_digests(draft, name) or {}
                refuse(str(copied[name].donor), digest_problems(os.path.join(draft, name), copied_digests))
                digests |= {f"{name}/{file}": value for file, value in copied_digests.items() if file in paths}
            config.digests = digests or None
            config.save_pretrained(draft)
            card.save(Path(draft, README))
            save_local_tokenizer(config, folder, draft)

    def _files(self, organ: PlannedOrgan) -> dict[str, str]:
        """Fetch the files of a donor, and return their local paths by name."""
        source, variant = organ.source, organ.config.weights_variant
        donor = str(source.donor)
        where: dict[str, Any] = {**self.hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
        open_checkpoint(donor, variant=variant, **where)  # raises if a file is incomplete
        files = checkpoint_files(donor, variant, **where)
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
    """Plan a composition of donors. Configs and headers are read, weights are not, and nothing is written.

    Args:
        donors: Folders, Hub IDs or `OrganSource`s, in load order. Organs without a name are named after their repo. A
            composition stands for its organs.
        base: Folder or Hub ID of the recipient; default: the base that all donors name.
        base_revision: Its branch, tag or commit.
        **hub_kwargs: `token`, `cache_dir`, `force_download`, `local_files_only` for base and donors.

    Raises:
        IncompatibleDonorError: Lists all mismatches of all organs, or names two that overlap.
        CorruptDonorError: A donor is damaged.
        NotHFError: Two organs have one name, or the donors name different bases.
        OSError: A repo cannot be read.

    Examples:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, OrganSource, compose
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/base")
        ...     DonorModel.from_base(f"{folder}/base", layers=(1, 3)).save_pretrained(f"{folder}/kjv")
        ...     plan = compose([f"{folder}/kjv", OrganSource("law", f"{folder}/kjv", position=0)])
        ...     plan.save_pretrained(f"{folder}/both")
        >>> [organ.name for organ in plan.organs], len(plan.stack)
        (['kjv', 'law'], 8)
    """
    require_known(hub_kwargs)
    sources = [_source(donor) for donor in ([donors] if isinstance(donors, str) else donors)]
    if not sources:
        raise NotHFError("compose needs at least one donor; give folders or Hub IDs: compose([donor, ...])")
    read = [(source, *resolve_donor(source, hub_kwargs)) for source in sources]
    base_subfolder = None
    if base is None:
        base, base_revision, base_subfolder = _common_base([each[:2] for each in read], base_revision)
    else:
        _require_repo(base, base_revision)
    organs = [organ for source, config, found in read for organ in _named(source, config, found, hub_kwargs)]
    require_distinct([organ.name for organ in organs])

    base = os.fspath(base)
    revision = resolve_commit(base, {**hub_kwargs, "revision": base_revision})
    where = {**hub_kwargs, "revision": revision, "subfolder": base_subfolder or ""}
    base_config = layers_config(read_base_config(base, None, where)[0])
    stack = validate(organs, base_config).stack
    planned = [_planned(organ, hub_kwargs) for organ in organs]
    return Plan(base, _commit(base, revision, hub_kwargs), base_subfolder, base_config, planned, stack, hub_kwargs)


def _planned(organ: ResolvedOrgan, hub_kwargs: Mapping[str, Any]) -> PlannedOrgan:
    """Check the headers of an organ's files, and fill in its place and size."""
    donor, config = str(organ.donor), copy.copy(organ.spec.config)
    config.position, config.mode, config.scale = int(organ.place.position), organ.mode, organ.scale
    where = {**hub_kwargs, "revision": organ.revision, "subfolder": organ.subfolder or ""}
    tensors = list_tensors(donor, config.weights_variant, **where)
    refuse(donor, header_problems(organ.spec, tensors))
    num_parameters = sum(math.prod(tensor.shape) for tensor in assembled(tensors, config).values())
    return PlannedOrgan(organ, config, num_parameters, sum(map(size_of, tensors.values())))


def _source(donor: str | os.PathLike[str] | OrganSource) -> OrganSource:
    source = donor if isinstance(donor, OrganSource) else OrganSource("", donor)
    if isinstance(source.donor, DonorModel):
        raise NotHFError("compose takes folders and Hub IDs, not a DonorModel; save it first, then give its folder")
    _require_repo(source.donor, source.revision)
    return replace(source, donor=os.fspath(source.donor))


def _require_repo(name: str | os.PathLike[str], revision: str | None) -> None:
    """Check that a revision is not that of a folder, where it would be ignored."""
    if revision is not None and os.path.isdir(name):
        raise NotHFError(f"{name} is a folder and has no revision {revision!r}; leave it out, or give a Hub ID")


def _named(
    source: OrganSource, config: DonorConfig, organs: Sequence[ResolvedOrgan], hub_kwargs: Mapping[str, Any]
) -> Iterator[ResolvedOrgan]:
    """Give the organs of a donor names, and commits as revisions."""
    if config.donors is not None and (source.name or not source.active):
        raise NotHFError(
            f"{source.donor} is a composition, whose organs have names; to rename or deactivate one, give it by itself"
        )
    for organ in organs:
        last = os.path.basename(os.path.abspath(organ.subfolder or str(organ.donor)))
        commit = _commit(str(organ.donor), organ.revision, hub_kwargs)
        yield replace(organ, name=organ.name or re.sub(r"[^\w-]", "-", last), revision=commit)


def _common_base(
    donors: Sequence[tuple[OrganSource, DonorConfig]], revision: str | None
) -> tuple[str, str | None, str | None]:
    """Return the base that all donors name, its given or common revision, and its subfolder."""
    names = {(config.base_model_name_or_path, config.base_subfolder): source.donor for source, config in donors}
    ((name, subfolder), *others) = names
    if name is None or others:
        named = ", ".join(f"{donor}: {'/'.join(filter(None, base)) or 'none'}" for base, donor in names.items())
        raise NotHFError(f"the donors do not name one base ({named}); give it: compose(donors, base)")
    revisions = sorted({config.base_revision for _, config in donors if config.base_revision})
    if revision is None and len(revisions) > 1:
        raise NotHFError(
            f"the donors name different commits of {name} ({', '.join(revisions)}); choose one: base_revision=..."
        )
    return name, revision or (revisions[0] if revisions else None), subfolder


def _commit(name: str, revision: str | None, hub_kwargs: Mapping[str, Any]) -> str | None:
    """Return the commit of a resolved revision, `None` for a folder."""
    if os.path.isdir(name):
        return None
    # a revision stays unresolved if the config was in the cache and the Hub answered with an error: raise that error
    with reaching_hub(f"{name} cannot be read"):
        return commit_of(revision) or model_info(name, revision=revision, token=hub_kwargs.get("token")).sha
