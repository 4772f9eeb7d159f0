"""Merge a donor into its recipient from files to files: tensors are copied, and no model is built in memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.utils import tqdm
from transformers import AutoProcessor, AutoTokenizer, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from not_hf.architecture.stack import layers_config
from not_hf.architecture.upstream import require_known, without_progress_bar
from not_hf.cards.common import README
from not_hf.cards.merged import merged_card
from not_hf.donor.tokenizer import TOKENIZER_FILES
from not_hf.errors import NotHFError, one_line
from not_hf.hub.atomic_write import replacing, require_no_donor
from not_hf.hub.checkpoint import View
from not_hf.hub.partial_download import borrow_part
from not_hf.hub.tensor_file import write_tensors
from not_hf.recipient.hollow import HollowMerge, NotCopiedError, OpenedMerge, hollow_merge, open_merge
from not_hf.recipient.new_tokens import brings_tokens
from not_hf.recipient.organ_tensor import OrganTensor, name_in_recipient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A merged model that was written.

    Args:
        folder: Where.
        architecture: Name of its native class.
        num_layers: Number of its layers.
        num_parameters: Number of its parameters.
        built_because: Why the whole model was built in memory; `None` if tensors were copied from file to file.
    """

    folder: str
    architecture: str
    num_layers: int
    num_parameters: int
    built_because: str | None


def merge_donor(
    donor: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    **hub_kwargs: Any,
) -> Merged:
    """Merge a donor or composition into its recipient: a native model with tokenizer and card, written to a folder.

    The tokenizer is the recipient's, or the donor's if it has rows for tokens that the recipient's lacks.

    Its files are those that `merge_and_unload().save_pretrained(folder)` writes, bit for bit. But tensors are copied
    from file to file, a few megabytes at a time, so the model need not fit in memory. If a recipient on the Hub is not
    in the cache, its bytes are fetched for one file to write after the other, and not kept.

    Where the layout of the files is not that of the model (mixtures of experts, quantized recipients), the model is
    built in memory, and a warning says so.

    Args:
        donor: Folder or Hub ID of a donor or composition.
        folder: Folder to write; created if missing. It may hold another model, but no donor and no base that is
            read. As with any error, it is unchanged if the merge fails.
        base: Folder or Hub ID of the recipient; `None`: the base that the donor was cut from.
        max_shard_size: Size above which the weights are split into several files.
        **hub_kwargs: `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        IncompatibleDonorError: The organs do not fit, or a native model cannot hold them; the error lists all reasons.
        CorruptDonorError: The donor is damaged.
        NotHFError: The recipient is quantized, or the folder holds a donor or that base.
        OSError: A file cannot be read.

    Examples:
        >>> import tempfile
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from not_hf import DonorModel, merge_donor
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, donor = f"{folder}/base", f"{folder}/donor"
        ...     GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2)).save_pretrained(base)
        ...     _ = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel())).save_pretrained(base)
        ...     DonorModel.from_base(base, layers=(1, 3)).save_pretrained(donor)
        ...     merge_donor(donor, f"{folder}/merged").num_layers
        6
    """
    require_known(hub_kwargs)
    first, second = (donor, None) if base is None else (base, donor)
    opened, reason = open_merge(first, second, hub_kwargs), None
    _require_other_folder(folder, opened)
    processor = _processor(os.fspath(first), opened.base_config, hub_kwargs)
    with replacing(folder, stale=() if processor is None else TOKENIZER_FILES) as draft:
        try:
            merge = hollow_merge(opened, folder)
        except NotCopiedError as error:
            reason = str(error)
            logger.warning("the whole model is built in memory to merge %s: %s", donor, reason)
            model = opened.kind.from_pretrained(first, second, **hub_kwargs)
            tokenizer = getattr(processor, "tokenizer", processor)
            if second is not None and tokenizer is not None and brings_tokens(model, tokenizer):
                processor = _processor(os.fspath(second), opened.base_config, hub_kwargs)
            card = merged_card(model, folder, **hub_kwargs)
            native = model.merge_and_unload()
            native.save_pretrained(draft, max_shard_size=max_shard_size)
        else:
            native, card = merge.native, merge.card
            _copy(opened, merge, draft, max_shard_size)
        if processor is not None:
            processor.save_pretrained(draft)
        card.save(Path(draft, README))
    num_layers = layers_config(native.config).num_hidden_layers
    return Merged(os.fspath(folder), type(native).__name__, num_layers, native.num_parameters(), reason)


def _require_other_folder(folder: str | os.PathLike[str], opened: OpenedMerge) -> None:
    """Refuse to write over a donor, or over a base that is read: neither could be had back of the merged model."""
    require_no_donor(folder)
    bases = [(str(opened.resolved.base), opened.base_where.get("subfolder"))]
    configs = [organ.spec.config for organ in opened.resolved.organs]
    bases += [(each.base_model_name_or_path or "", each.base_subfolder) for each in configs]
    for base, subfolder in bases:
        place = os.path.join(base, subfolder or "")
        if os.path.isdir(place) and os.path.isdir(folder) and os.path.samefile(place, folder):
            raise NotHFError(f"{folder} holds a base, which the merged model would overwrite; choose another folder")


def _processor(name: str, config: PreTrainedConfig, hub_kwargs: Mapping[str, Any]) -> Any:
    """Load the tokenizer of a recipient or base, the processor if it takes more than text; `None`: there is none."""
    if layers_config(config) is not config:
        try:
            return AutoProcessor.from_pretrained(name, **hub_kwargs)
        except (ImportError, OSError, ValueError) as error:  # there is none, or not what it needs
            logger.warning("no processor is saved with the merged model, only a tokenizer: %s", one_line(error, 200))
    try:
        return AutoTokenizer.from_pretrained(name, **hub_kwargs)
    except ValueError as error:  # a model without a tokenizer is still a model
        if isinstance(error, NotHFError) or "trust_remote_code" in str(error):
            raise
        logger.warning("no tokenizer is saved with the merged model: %s", one_line(error, 200))
        return None


def _copy(opened: OpenedMerge, merge: HollowMerge, folder: str, max_shard_size: int | str) -> None:
    """Write config and weights as `save_pretrained` does, the weights tensor by tensor."""
    with without_progress_bar():
        merge.native.save_pretrained(folder, state_dict={})  # writes everything but weights
    split = split_torch_state_dict_into_shards(
        merge.tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    total = sum(tensor.nbytes for tensor in merge.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Merging", name="not_hf.merge") as bar:
        for file, names in split.filename_to_tensors.items():
            inside = {name: merge.tensors[name] for name in names}
            wanted = set(filter(None, (name_in_recipient(merge.sources[name]) for name in names)))
            with borrow_part(str(opened.resolved.base), wanted, **opened.base_where) as views:
                write_tensors(Path(folder, file), inside, _Values(merge, views), bar.update)
    if split.is_sharded:
        metadata = {"total_parameters": merge.native.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        Path(folder, SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Values:
    """Reads the values of tensors to write."""

    merge: HollowMerge
    views: Mapping[str, View]  # of the recipient's tensors

    def __call__(self, name: str) -> Iterator[torch.Tensor]:
        source = self.merge.sources[name]
        if isinstance(source, OrganTensor):
            return source.values(self.views)
        return (part.to(self.merge.tensors[name].dtype) for part in self.views[source].chunks())
