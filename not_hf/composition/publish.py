"""Push the folder of a donor to the Hub, without loading it into a model."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from huggingface_hub import CommitInfo
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import GENERATION_CONFIG_NAME

from not_hf.cards.common import README
from not_hf.cards.donor import updated_card
from not_hf.cards.license import joint_license, organ_license
from not_hf.composition.resolve import ResolvedOrgan, resolve_donor
from not_hf.composition.sources import OrganSource
from not_hf.config import DELTA
from not_hf.donor.delta import Delta, plan_delta, require_on_hub, write_delta
from not_hf.donor.loading import refuse
from not_hf.donor.modeling import DonorModel
from not_hf.donor.saving import digests_of
from not_hf.donor.tokenizer import warn_of_another_base
from not_hf.errors import NotHFError
from not_hf.hub.atomic_write import DRAFT
from not_hf.hub.consistent_read import require_same_save, saved_digests
from not_hf.hub.digest import digest_problems
from not_hf.hub.headers import size_of
from not_hf.hub.partial_download import list_tensors
from not_hf.hub.push import PushOptions, push_folder

EVAL_RESULTS = ".eval_results"  # folder of the Hub's results of benchmarks


def push_donor(
    folder: str | os.PathLike[str],
    repo_id: str,
    ignore: Sequence[str] = (),
    delta: str | None = None,
    rank: int | None = None,
    **options: Unpack[PushOptions],
) -> CommitInfo:
    """Check the folder of a donor or composition strictly, then push it with an updated card as one commit.

    The check includes the digest of the tensors, if their config has one.

    Args:
        folder: Folder of the donor. Organs that a composition lists from elsewhere must be on the Hub.
        repo_id: As in `push_to_hub`.
        ignore: Patterns of file names to leave out, besides Trainer's checkpoints and names that begin with a dot; of
            the latter, results of benchmarks in `.eval_results` are pushed. Folders of a composition's organs always
            are.
        delta: Push a delta, as in `DonorModel.save_pretrained`; the folder keeps its whole tensors.
        rank: Rank of its products.
        **options: As in `push_to_hub`.

    Raises:
        NotHFError: The folder is not a donor, or lists an organ from another folder; or no delta can be made of it, or
            it is one of a base on this machine.
        CorruptDonorError: An organ is damaged.
        OSError: The Hub refuses the push or cannot be reached; the repo is unchanged.

    Examples:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, push_donor
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     DonorModel.from_base(base, layers=(1, 3)).save_pretrained(folder)
        ...     commit = push_donor(folder, "me/gpt2-example", commit_message="First organ")
        >>> commit.commit_message
        'First organ'
    """
    folder, token = Path(folder), options.get("token")
    if not folder.is_dir():
        raise NotHFError(f"no folder {folder}; give the folder of a donor")
    config, organs = resolve_donor(OrganSource("", folder), {} if token is None else {"token": token})
    inside = [organ for organ in organs if organ.is_local]
    for organ in inside:
        if organ.donor != folder:
            raise NotHFError(
                f"organ {organ.name!r} is in {organ.donor}, a folder of this machine; copy it into {folder}"
            )
        if organ.spec.config.delta is not None:
            where = folder / (organ.subfolder or "")
            base = Delta.of(organ.spec.config).base_model_name_or_path
            require_on_hub(base, f"save {where} whole, or name the base's Hub ID in its config.json under delta")
    planned = plan_delta(delta, rank, config, is_pushed=True)
    if planned is not None and (config.donors is not None or config.delta is not None):
        kind = "a composition, whose organs are pushed one by one as" if config.delta is None else "already"
        raise NotHFError(f"{folder} is {kind} a delta; leave out delta")
    num_parameters, size = _measured(folder, inside, token)
    if len(inside) < len(organs):  # the sizes of organs in other repos are unknown
        num_parameters = size = None
    needed = {
        place for organ in inside for path in [folder / (organ.subfolder or "")] for place in (path, *path.parents)
    }
    stated = config.license
    if stated is None:
        configs = [organ.spec.config for organ in organs]
        joint_license(organ_license(each, revision=each.base_revision, token=token) for each in configs).set(config)

    def save(target: str, repo_id: str) -> None:
        readme = Path(target, README)  # the published card, if any
        card = updated_card(folder, config, num_parameters, size, repo_id, published=readme)
        ignored, hidden = shutil.ignore_patterns(f"{DRAFT}*", "checkpoint-*", *ignore), shutil.ignore_patterns(".*")

        def left_out(place: str, names: list[str]) -> set[str]:
            found = ignored(place, names) | (hidden(place, names) - {EVAL_RESULTS})
            return {name for name in found if Path(place, name) not in needed}

        if not (folder / GENERATION_CONFIG_NAME).exists():  # an earlier donor's, which a load would use for this one
            Path(target, GENERATION_CONFIG_NAME).unlink(missing_ok=True)
        if Path(target, TOKENIZER_CONFIG_FILE).exists() and not (folder / TOKENIZER_CONFIG_FILE).exists():
            warn_of_another_base(config, target)
        shutil.copytree(folder, target, dirs_exist_ok=True, ignore=left_out)
        require_same_save(target, None, config.digests)
        for organ in inside:
            place = os.path.join(target, organ.subfolder or "")
            refuse(os.path.join(folder, organ.subfolder or ""), digest_problems(place, saved_digests(place)))
        if config.license != stated:
            config.save_pretrained(target)
        card.save(readme)
        if planned is not None:
            smaller = copy.copy(config)
            smaller.delta, new_size = write_delta(target, planned, config, token=token)
            smaller.digests = digests_of(target, target, DELTA)
            smaller.save_pretrained(target)
            updated_card(folder, smaller, num_parameters, new_size, repo_id, published=readme).save(readme)

    return push_folder(save, repo_id, **options)


def _measured(folder: Path, inside: Sequence[ResolvedOrgan], token: Any) -> tuple[int | None, int | None]:
    """Load the organs in a folder to check them; returns their number of parameters and the bytes of their files."""
    num_parameters = size = 0
    for organ in inside:
        where = {"subfolder": organ.subfolder or "", "token": token}
        num_parameters += DonorModel.from_pretrained(folder, **where).num_parameters()
        tensors = list_tensors(folder, organ.spec.config.weights_variant, **where)
        size += sum(map(size_of, tensors.values()))
    return num_parameters, size
