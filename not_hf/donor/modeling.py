"""`DonorModel`: an organ on its own, as a native base model stripped to its layers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from huggingface_hub import CommitInfo
from huggingface_hub.utils import TensorInfo
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from not_hf.architecture.differences import config_differences, inherit_attributes, same_modules
from not_hf.architecture.layers import adopt, check_bare, is_finite, silence, strip_to_layers
from not_hf.architecture.splicing import set_layer_index, spliced_config
from not_hf.architecture.stack import Stack, find_stack, head_class
from not_hf.architecture.tables import NEUTRAL_EMBEDDING
from not_hf.architecture.twin import build, meta_twin
from not_hf.architecture.upstream import (
    AUTO_KWARGS,
    DelegatesAttention,
    attention_of,
    built_whole,
    set_attention,
    set_layers,
)
from not_hf.cards.common import README
from not_hf.cards.donor import updated_card
from not_hf.cards.license import inherit_license
from not_hf.config import DonorConfig
from not_hf.donor.cutting import LiveBase, StoredBase, cut_config, open_base
from not_hf.donor.loading import dtype_of, expert_problems, fill, loading_problems, refuse, tensor_problems
from not_hf.donor.tokenizer import save_local_tokenizer
from not_hf.errors import CorruptDonorError, UnsupportedArchitectureError, one_line, some
from not_hf.hub.atomic_write import replacing, require_donor_folder
from not_hf.hub.checkpoint import open_checkpoint
from not_hf.hub.push import PushOptions, push_folder
from not_hf.hub.repo import HUB_KWARGS, resolve_commit


class DonorModel(DelegatesAttention, PreTrainedModel):
    """One organ: `k` layers of a causal or masked LM, without embeddings, head or final norm.

    It is the native base model with everything but its layers taken out, so checkpoints are stored in the layout the
    architecture has on the Hub, and masks, rotary embeddings and caches are the native ones.

    Args:
        config: What the organ is and where it was cut.

    Raises:
        CorruptDonorError: The config contradicts itself.
        UnsupportedArchitectureError: The architecture has no stack that can be cut.
    """

    config: DonorConfig
    config_class = DonorConfig
    base_model_prefix = "organ"
    main_input_name = "inputs_embeds"
    supports_gradient_checkpointing = True

    def __init__(self, config: DonorConfig, *args: Any, **kwargs: Any) -> None:
        base, native = config.check()
        expected = spliced_config(base, [(base, n) for n in range(*config.span)])
        if contradictions := config_differences(native, expected):
            raise CorruptDonorError(
                f"donor config: organ_config contradicts layers {config.layers} of base_config: {some(contradictions)}"
            )
        set_attention(native, attention_of(config))
        for key, neutral in NEUTRAL_EMBEDDING.items():
            if hasattr(native, key):
                setattr(native, key, neutral)
        super().__init__(config, *args, **kwargs)
        # in the dtype that is being loaded, not in the one the base's config names
        dtype, span = torch.get_default_dtype(), slice(*config.span)
        hollow = torch.get_default_device().type == "meta"  # to be filled: there is nothing to initialize
        with built_whole(hollow):
            stack = find_stack(build(head_class(native).from_config, native, dtype=dtype))
        originals = meta_twin(base).layers[span]
        if not same_modules(stack.layers, originals):  # what a layer is made of depends on where it stands
            set_attention(base, attention_of(config))
            with built_whole():
                whole = find_stack(build(head_class(base).from_config, base, dtype=dtype))
            set_layers(stack.layers, list(whole.layers)[span])
            for n, layer in enumerate(stack.layers):
                set_layer_index(layer, n)
                adopt(layer, native, {}, layer.training)
        inherit_attributes(list(stack.layers), originals)
        strip_to_layers(stack)
        self.organ: PreTrainedModel = stack.base_model
        set_attention(config, attention_of(self.organ.config))
        self._stack_path = stack.path
        self.post_init()

    @property
    def stack(self) -> Stack:
        """Where the organ's layers are."""
        return Stack(self, self.base_model_prefix, self._stack_path)

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """An organ has no embeddings."""

    def get_output_embeddings(self) -> None:
        """An organ has no head."""

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the organ alone on hidden states.

        Given the base's `hidden_states[i]`, the result is its `hidden_states[j]` (before the final norm if `j` is the
        last).

        Args:
            inputs_embeds: Hidden states at the organ's entry, `(batch, seq, hidden)`.
            attention_mask: 1 for tokens, 0 for padding, `(batch, seq)`.
            position_ids: Positions of the tokens, `(batch, seq)`.
            use_cache: Return `past_key_values`.
            **kwargs: As in the native base model (`past_key_values`, `output_hidden_states`, …).

        Returns:
            The native output; `last_hidden_state` is `(batch, seq, hidden)`.
        """
        return self.organ(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        layers: Sequence[int],
        position: int | None = None,
        mode: str = "insert",
        init: str = "copy",
        *,
        domain: str | None = None,
        license: str | None = None,
        dtype: str | torch.dtype = "auto",
        **hub_kwargs: Any,
    ) -> DonorModel:
        """Cut an organ out of a causal or masked LM.

        Args:
            base: Local folder, Hub ID or live model. A live model is not changed: the organ owns copies.
            layers: Half-open span `(i, j)` of the base's layers.
            position: Where the organ goes by default, in the recipient's own layers. `None`: right after the span for
                `mode="insert"`, the span itself for `mode="replace"`.
            mode: `"insert"` before layer `position`, or `"replace"` layers `position … position + k`.
            init: `"copy"` keeps the layers as cut; `"identity"` zeroes their output projections, so that an inserted
                organ starts as an exact no-op.
            domain: What the organ is going to be trained for, free text.
            license: The Hub's identifier of the organ's licence; `None`: what the base's card says. For a live model
                that card is read only if it is on this machine.
            dtype: Of the organ; `"auto"` keeps the checkpoint's.
            **hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            NotHFError: An argument is out of range.
            UnsupportedArchitectureError: The base cannot give layers, or `init="identity"` cannot make them a no-op.
            OSError: The base cannot be read.
        """
        source = open_base(base, **hub_kwargs)
        config = cut_config(source, layers, position, mode, init, license)
        config.domain = domain
        name, live = source.name or "the live model", isinstance(source, LiveBase)
        tensors = source.tensors(config.span)
        if source.quantization is not None and dtype == "auto":
            dtype = source.config.dtype or dtype  # those of the tensors are of blocks and their scales
        return cls.from_tensors(
            source, config, tensors, dtype, name=name, foreign=not live, quantization=source.quantization
        )

    @classmethod
    def from_tensors(
        cls,
        base: LiveBase | StoredBase,
        config: DonorConfig,
        tensors: Mapping[str, Any],
        dtype: str | torch.dtype = "auto",
        *,
        name: str,
        foreign: bool = False,
        quantization: dict[str, Any] | None = None,
    ) -> DonorModel:
        """Build an organ of a base out of its tensors, and try that it runs without the rest of the base.

        Args:
            base: What the organ is a part of; where it is live, the organ goes to its device.
            config: What the organ is. `init="identity"` is applied here.
            tensors: Tensors or lazy views by name below the base model, layers numbered from 0.
            dtype: As in `load_tensors`.
            name: Where the tensors are from, for errors.
            foreign: As in `load_tensors`.
            quantization: As in `load_tensors`.

        Raises:
            CorruptDonorError: As in `load_tensors`.
            UnsupportedArchitectureError: As in `from_base`.
        """
        state = {f"{cls.base_model_prefix}.{key}": tensor for key, tensor in tensors.items()}
        attention = attention_of(base.config) if isinstance(base, LiveBase) else None
        organ, _ = cls.load_tensors(
            config,
            state,
            dtype,
            source=name,
            foreign=foreign,
            quantization=quantization,
            attn_implementation=attention,
        )
        if isinstance(base, LiveBase):
            nn.Module.to(organ, base.model.device)
        hidden = torch.randn(1, 4, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(organ.device, organ.dtype)  # (batch=1, seq=4, hidden)
        check_bare(organ, organ.stack, hidden)
        if config.init == "identity":
            _make_identity(organ, hidden)
        return organ

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: DonorConfig | str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype | None = "auto",
        **kwargs: Any,
    ) -> DonorModel:
        """Load an organ from a folder or the Hub, strictly. Arguments as in `PreTrainedModel.from_pretrained`.

        Raises:
            CorruptDonorError: A tensor is missing, unexpected, mis-shaped, non-finite or not floating-point, a file is
                truncated, or the config contradicts the weights.
            OSError: The repo cannot be read.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, dtype=dtype, **kwargs)
        source = os.fspath(pretrained_model_name_or_path)
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        hub_kwargs["revision"] = resolve_commit(source, hub_kwargs)
        for auto in (*AUTO_KWARGS, "trust_remote_code"):
            kwargs.pop(auto, None)
        if not isinstance(config, DonorConfig):
            config = DonorConfig.from_pretrained(config or source, **hub_kwargs)
        config.check()
        views = open_checkpoint(source, variant=kwargs.pop("variant", None), **hub_kwargs)
        refuse(source, tensor_problems(views))
        wants_info = kwargs.pop("output_loading_info", False)
        dtype = kwargs.pop("torch_dtype", dtype)
        organ, missing = cls.load_tensors(config, views, dtype, *model_args, source=source, **kwargs)
        organ.config.name_or_path = source
        info = {"missing_keys": missing, "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (organ, info) if wants_info else organ  # type: ignore[return-value]

    @classmethod
    def load_tensors(
        cls,
        config: DonorConfig,
        tensors: Mapping[str, Any],
        dtype: str | torch.dtype | None = "auto",
        *model_args: Any,
        source: str = "the checkpoint",
        partial: bool = False,
        foreign: bool = False,
        quantization: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[DonorModel, set[str]]:
        """Build an organ and fill it, refusing what is off.

        Args:
            config: What the organ is.
            tensors: Tensors or lazy views of them, by the names they have in a checkpoint.
            dtype: Of the organ; `"auto"` keeps theirs.
            source: Where they are from, for errors.
            partial: Accept that tensors are missing, as in one shard of a checkpoint.
            foreign: Accept tensors that the native class has no use for, as old checkpoints of a base have.
            quantization: The base's `quantization_config`, for transformers to undo while it loads.
            **kwargs: As in `PreTrainedModel.from_pretrained`.

        Returns:
            The organ, and the names of its tensors that were missing.

        Raises:
            CorruptDonorError: As in `from_pretrained`.
        """
        if not partial:
            refuse(source, expert_problems(tensors))
        organ, info = fill(
            cls, config, tensors, dtype, *model_args, source=source, quantization=quantization, **kwargs
        )
        problems = loading_problems(info, partial, foreign) or [
            f"non-finite values in {name}"
            for name, tensor in organ.state_dict().items()
            if not tensor.is_meta and not is_finite(tensor)
        ]
        refuse(source, problems)
        return organ, set(info["missing_keys"])

    @classmethod
    def header_problems(cls, config: DonorConfig, headers: Mapping[str, TensorInfo]) -> list[str]:
        """What is wrong with a donor's weights as far as the headers of its files tell; the weights are not read.

        Args:
            config: Of the donor.
            headers: What `list_tensors` gives for it.

        Returns:
            One line for each tensor that is missing, unexpected, mis-shaped, empty or not floating-point.

        Raises:
            CorruptDonorError: The config contradicts itself.
        """
        config.check()
        problems = tensor_problems(headers) + expert_problems(headers)
        hollow = {name: torch.empty(each.shape, dtype=dtype_of(each), device="meta") for name, each in headers.items()}
        try:
            _, info = fill(cls, config, hollow, source="the checkpoint", device_map="meta")
        except CorruptDonorError as error:
            return problems or [str(error)]
        return [*problems, *(problem for problem in loading_problems(info) if problem not in problems)]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write `config.json`, `model.safetensors`, the card and, for a local base, its tokenizer.

        Args:
            save_directory: Folder; created when missing.
            is_main_process: Write on this process; `False` on the other ranks of a distributed run.
            state_dict: Tensors to save instead of the organ's own, by the organ's names.
            push_to_hub: Push afterwards to `repo_id` (default: the folder's name), as transformers does.
            max_shard_size: Past this size the weights are sharded.

        Raises:
            CorruptDonorError: A tensor is empty, not materialized or not finite; nothing is written then.
        """
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        push_kwargs = {key: kwargs.pop(key) for key in PushOptions.__annotations__ if key in kwargs}
        self.save_donor(save_directory, is_main_process, state_dict, max_shard_size=max_shard_size, **kwargs)
        if push_to_hub:
            self.push_to_hub(repo_id, max_shard_size=max_shard_size, **push_kwargs)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, max_shard_size: int | str = "5GB", **options: Unpack[PushOptions]
    ) -> CommitInfo:
        """Push the organ and its card to the Hub as one commit. Arguments as in `PreTrainedModel.push_to_hub`.

        Raises:
            NotHFError: The repo holds another kind of model.
            OSError: The Hub refuses, or cannot be reached; the repo is as it was.
        """
        inherit_license(self.config, revision=self.config.base_revision, token=options.get("token"))

        def save(folder: str, repo_id: str) -> None:
            self.save_donor(folder, repo_id=repo_id, max_shard_size=max_shard_size)

        return push_folder(save, repo_id, self.model_tags, **options)

    def save_donor(
        self,
        folder: str | os.PathLike[str],
        is_main_process: bool = True,
        tensors: Mapping[str, torch.Tensor] | None = None,
        repo_id: str | None = None,
        draft: str | None = None,
        **kwargs: Any,
    ) -> None:
        """`save_pretrained` without the push.

        Args:
            repo_id: Where the card says the organ lies.
            draft: Write there, for the caller to move to `folder`, a tokenizer too.
        """
        tensors = self.state_dict() if tensors is None else tensors
        hollow = [name for name, tensor in tensors.items() if tensor.numel() == 0 or tensor.is_meta]
        if hollow:
            raise CorruptDonorError(f"refusing to save empty or unmaterialized tensors: {', '.join(hollow[:5])}")
        if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
            raise CorruptDonorError(
                f"refusing to save NaN or infinity, which no load takes: {', '.join(broken[:5])}; did it diverge?"
            )
        require_donor_folder(folder)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        num_parameters = sum(tensor.numel() for tensor in tensors.values())
        card = updated_card(folder, self.config, num_parameters, size, repo_id)  # raises before anything is written
        with contextlib.nullcontext(draft) if draft else replacing(folder) as place:
            super().save_pretrained(place, is_main_process, dict(tensors), **kwargs)
            if not is_main_process:
                return
            card.save(os.path.join(place, README))
            if draft is None:
                save_local_tokenizer(self.config.base_model_name_or_path, folder, place)


def _make_identity(organ: DonorModel, hidden: torch.Tensor) -> None:
    """Silence every layer, then check on hidden states that nothing is left."""
    for layer in organ.stack.layers:
        silence(layer)
    try:
        with torch.no_grad():
            silent = torch.equal(organ(inputs_embeds=hidden).last_hidden_state, hidden)
    except Exception as error:  # native forwards raise anything on what they do not expect
        reason = one_line(error, 200)
        raise UnsupportedArchitectureError(f"an organ of these layers cannot be run alone: {reason}") from error
    if not silent:
        raise UnsupportedArchitectureError(
            f"layers of model_type {organ.organ.config.model_type!r} do not become a no-op when their output "
            "projections are zero; use init='copy'"
        )
