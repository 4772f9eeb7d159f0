"""`DonorModel`: an organ on its own. Cut it, load it, save it, share it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.layers import is_finite, silence
from not_hf.architecture.upstream import (
    AUTO_KWARGS,
    HUB_KWARGS,
    attention_of,
    built_whole,
    forget_conversions,
    resolve_commit,
    without_load_report,
)
from not_hf.cards.license import inherit_license
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor.cutting import LiveBase, StoredBase, cut_config, open_base
from not_hf.donor.loading import (
    common_dtype,
    expert_problems,
    loading_problems,
    refuse,
    tensor_problems,
)
from not_hf.donor.saving import write_donor
from not_hf.donor.stripped import StrippedModel
from not_hf.errors import CorruptDonorError, UnsupportedArchitectureError, one_line
from not_hf.hub.checkpoint import open_checkpoint
from not_hf.hub.push import PushOptions, push_folder


class DonorModel(StrippedModel):
    """One organ: `k` layers of a causal or masked LM, without embeddings, head or final norm.

    It is the native base model with everything but its layers taken out, so checkpoints are stored in the layout the
    architecture has on the Hub, and masks, rotary embeddings and caches are the native ones.

    Args:
        config: What the organ is and where it was cut.

    Raises:
        CorruptDonorError: The config contradicts itself.
        UnsupportedArchitectureError: The architecture has no stack that can be cut.
    """

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
            quantization: As in `fill`.

        Raises:
            CorruptDonorError: As in `load_tensors`.
            UnsupportedArchitectureError: As in `from_base`.
        """
        state = {f"{cls.base_model_prefix}.{key}": tensor for key, tensor in tensors.items()}
        attention = attention_of(base.config) if isinstance(base, LiveBase) else None
        organ, _ = cls.load_tensors(
            config.check(),
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
        organ.require_bare(hidden)
        if config.init == "identity":
            organ._make_identity(hidden)
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
        wants_info, dtype = kwargs.pop("output_loading_info", False), kwargs.pop("torch_dtype", dtype)
        organ, missing = cls.load_files(config.check(), source, hub_kwargs, dtype, *model_args, **kwargs)
        info = {"missing_keys": missing, "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (organ, info) if wants_info else organ  # type: ignore[return-value]

    @classmethod
    def load_files(
        cls,
        spec: OrganSpec,
        source: str,
        hub_kwargs: Mapping[str, Any],
        dtype: str | torch.dtype | None = "auto",
        *model_args: Any,
        variant: str | None = None,
        **kwargs: Any,
    ) -> tuple[DonorModel, set[str]]:
        """Load an organ whose config has been read and whose revision is pinned.

        Args:
            spec: What the organ is.
            source: Folder or Hub ID.
            hub_kwargs: How its files are reached.
            dtype: As in `load_tensors`, like what it returns and raises.
            variant: As in transformers: `model.<variant>.safetensors`.
            **kwargs: As in `PreTrainedModel.from_pretrained`.
        """
        views = open_checkpoint(source, variant=variant, **hub_kwargs)
        refuse(source, tensor_problems(views))
        organ, missing = cls.load_tensors(spec, views, dtype, *model_args, source=source, **kwargs)
        organ.config.name_or_path = source
        return organ, missing

    @classmethod
    def load_tensors(
        cls,
        spec: OrganSpec,
        tensors: Mapping[str, Any],
        dtype: str | torch.dtype | None = "auto",
        *model_args: Any,
        source: str = "the checkpoint",
        partial: bool = False,
        foreign: bool = False,
        **kwargs: Any,
    ) -> tuple[DonorModel, set[str]]:
        """Build an organ out of tensors, strictly.

        Args:
            spec: What the organ is.
            tensors: Tensors or lazy views of them, by the names they have in a checkpoint.
            dtype: Of the organ; `"auto"` keeps theirs.
            source: Where they are from, for errors.
            partial: Accept missing tensors, as in one shard of a checkpoint.
            foreign: Accept tensors that the native class has no use for, as old checkpoints of a base have.
            **kwargs: As in `fill`.

        Returns:
            The organ, and the names of its tensors that were missing.

        Raises:
            CorruptDonorError: As in `from_pretrained`.
        """
        if not partial:
            refuse(source, expert_problems(tensors))
        organ, info = cls.fill(spec, tensors, dtype, *model_args, source=source, **kwargs)
        refuse(source, loading_problems(info, partial, foreign))
        refuse(
            source,
            [
                f"non-finite values in {name}"
                for name, tensor in organ.state_dict().items()
                if not tensor.is_meta and not is_finite(tensor)
            ],
        )
        return organ, set(info["missing_keys"])

    @classmethod
    def fill(
        cls,
        spec: OrganSpec,
        tensors: Mapping[str, Any],
        dtype: str | torch.dtype | None = "auto",
        *model_args: Any,
        source: str,
        quantization: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[DonorModel, dict[str, Any]]:
        """Build an organ and load those tensors that fit.

        Args:
            spec: What the organ is.
            tensors: Tensors or lazy views of them, by the names they have in a checkpoint.
            dtype: Of the organ; `"auto"` is the one that most of the floating-point values have.
            source: Where they are from, for errors.
            quantization: The base's `quantization_config`, for transformers to undo.
            **kwargs: As in `PreTrainedModel.from_pretrained`.

        Returns:
            The organ, and transformers' `output_loading_info`, for `loading_problems`.

        Raises:
            CorruptDonorError: There is no tensor, or they cannot be brought into the layout of the modules.
        """
        if not tensors:
            raise CorruptDonorError(f"{source}: the checkpoint holds no tensor")
        if dtype in (None, "auto"):
            dtype = common_dtype(tensors)
        config = spec.config
        if quantization is not None:
            config = copy.deepcopy(config)
            config.quantization_config = quantization  # transformers takes it away when it has dequantized
        try:
            with built_whole(), without_load_report():
                loaded: Any = super().from_pretrained(
                    None,
                    *model_args,
                    config=config,
                    spec=spec,
                    state_dict=dict(tensors),
                    dtype=dtype,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **kwargs,
                )
        except RuntimeError as error:  # tensors that cannot be brought into the module's layout
            raise CorruptDonorError(f"{source}: {one_line(error, 300)}") from error
        organ, info = loaded
        forget_conversions(organ)
        return organ, info

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
        write_donor(self, save_directory, is_main_process, state_dict, max_shard_size=max_shard_size, **kwargs)
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
            write_donor(self, folder, repo_id=repo_id, max_shard_size=max_shard_size)

        return push_folder(save, repo_id, self.model_tags, **options)

    @torch.no_grad()
    def _make_identity(self, hidden: torch.Tensor) -> None:
        """Zero the output projections of every layer, then check that hidden states go through unchanged."""
        for layer in self.stack.layers:
            silence(layer)
        try:
            silent = torch.equal(self(inputs_embeds=hidden).last_hidden_state, hidden)
        except Exception as error:  # native forwards raise anything on what they do not expect
            reason = one_line(error, 200)
            raise UnsupportedArchitectureError(f"an organ of these layers cannot be run alone: {reason}") from error
        if not silent:
            raise UnsupportedArchitectureError(
                f"layers of model_type {self.organ.config.model_type!r} do not become a no-op when their output "
                "projections are zero; use init='copy'"
            )
