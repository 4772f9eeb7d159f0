"""`DonorModel`: cut, load, save and push a donor."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture import upstream
from not_hf.architecture.file_layout import forget_conversions
from not_hf.architecture.layers import is_finite
from not_hf.cards.license import inherit_license
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor.cutting import LiveBase, StoredBase, cut_config, open_base
from not_hf.donor.delta import plan_delta, with_base
from not_hf.donor.loading import common_dtype, expert_problems, loading_problems, open_tensors, refuse
from not_hf.donor.saving import write_donor
from not_hf.donor.stripped import StrippedModel
from not_hf.errors import CorruptDonorError, one_line
from not_hf.hub.consistent_read import read_steadily
from not_hf.hub.push import PushOptions, push_folder
from not_hf.limits import MAX_VALUES_BESIDE, MAX_VALUES_PER_STORED


class DonorModel(StrippedModel):
    """A donor: `k` layers of a causal or masked LM, without embeddings, head or final norm.

    It is the native base model stripped of everything but its layers. So checkpoints have the architecture's layout on
    the Hub, and masks, rotary embeddings and caches are native.

    Args:
        config: Describes the organ and its base.

    Raises:
        CorruptDonorError: The config contradicts itself.
        UnsupportedArchitectureError: The architecture has no stack that can be cut.

    Examples:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3), domain="Bible")
        >>> hidden_states = torch.zeros(1, 5, 8)  # (batch, seq, hidden)
        >>> donor(inputs_embeds=hidden_states).last_hidden_state.shape
        torch.Size([1, 5, 8])
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
        """Cut a donor out of a causal or masked LM.

        Args:
            base: Folder, Hub ID or live model. The layers of a live model are copied.
            layers: Half-open span `(i, j)` of the base's layers.
            position: Default position in a recipient, among its own layers. `None`: right after the span for
                `mode="insert"`, the span itself for `mode="replace"`.
            mode: `"insert"` before layer `position`, or `"replace"` layers `position … position + k`.
            init: `"copy"` keeps the weights; `"identity"` zeroes the output projections, or the gains of norms
                behind them, so that an inserted organ starts as an exact no-op.
            domain: Intended domain, free text.
            license: The Hub's identifier of the donor's licence; `None`: the licence on the base's card. For a live
                model that card is read only from the cache.
            dtype: dtype of the donor; `"auto"` keeps that of the checkpoint.
            **hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            NotHFError: An argument is out of range.
            UnsupportedArchitectureError: The base has no layers that can be cut, or `init="identity"` does not make
                them a no-op.
            OSError: The base cannot be read.

        Examples:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
            >>> donor = DonorModel.from_base(base, layers=(1, 3), mode="replace")
        """
        source = open_base(base, **hub_kwargs)
        config = cut_config(source, layers, position, mode, init, license)
        config.domain = domain
        name, live = source.name or "the live model", isinstance(source, LiveBase)
        tensors = source.tensors(config.span)
        if source.quantization is not None and dtype == "auto":
            dtype = source.config.dtype or dtype  # the tensors are packed blocks and their scales
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
        """Build a donor from tensors of a base, apply `init`, and check that it runs without the rest of the base.

        Args:
            base: The base. If it is live, the donor is put on its device.
            config: The donor's config.
            tensors: Tensors or lazy views by their names in the base model, with layers numbered from 0.
            dtype: As in `load_tensors`, like `foreign` and the errors.
            name: Source of the tensors, for errors.
            foreign: Accept unexpected tensors.
            quantization: As in `fill`.
        """
        state = {f"{cls.base_model_prefix}.{key}": tensor for key, tensor in tensors.items()}
        options: dict[str, Any] = {"source": name, "foreign": foreign, "quantization": quantization}
        options["attn_implementation"] = upstream.attention_of(base.config) if isinstance(base, LiveBase) else None
        organ, _ = cls.load_tensors(config.check(), state, dtype, **options)
        if isinstance(base, LiveBase):
            nn.Module.to(organ, base.model.device)
        hidden = torch.randn(1, 4, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(organ.device, organ.dtype)  # (batch=1, seq=4, hidden)
        organ.require_bare(hidden)
        if config.init == "identity":
            organ.make_identity(hidden)
        return organ

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: DonorConfig | str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype | None = "auto",
        verify: bool = False,
        **kwargs: Any,
    ) -> DonorModel:
        """Load a donor strictly from a folder or the Hub. Arguments as in `PreTrainedModel.from_pretrained`.

        If somebody saves to the folder meanwhile, the donor is that of before or after. The folder is only read.

        Args:
            verify: Also compare the tensors with the digest in `config.json`, which costs a pass over their bytes.

        Raises:
            CorruptDonorError: A tensor is missing, unexpected, mis-shaped, non-finite or not floating-point, a file is
                truncated, the config is invalid, or the digest differs.
            NotHFError: There is no digest to verify; an earlier version of not_hf saved the donor.
            OSError: The repo cannot be read.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, dtype=dtype, **kwargs)
        source = os.fspath(pretrained_model_name_or_path)
        hub_kwargs = {key: kwargs.pop(key) for key in upstream.HUB_KWARGS if key in kwargs}
        hub_kwargs["revision"] = upstream.resolve_commit(source, hub_kwargs)
        for auto in (*upstream.AUTO_KWARGS, "trust_remote_code"):
            kwargs.pop(auto, None)
        wants_info, dtype = kwargs.pop("output_loading_info", False), kwargs.pop("torch_dtype", dtype)

        def read() -> tuple[DonorModel, set[str]]:
            known = isinstance(config, DonorConfig)
            described: Any = config if known else DonorConfig.from_pretrained(config or source, **hub_kwargs)
            return cls.load_files(described.check(), source, hub_kwargs, dtype, *model_args, verify=verify, **kwargs)

        organ, missing = read_steadily(source, read)
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
        verify: bool = False,
        **kwargs: Any,
    ) -> tuple[DonorModel, set[str]]:
        """Load a donor whose config has been read; the rest is as in `load_tensors`.

        Args:
            source: Folder or Hub ID.
            hub_kwargs: `token`, `cache_dir`, …, with a pinned revision.
            variant: As in transformers, for `model.<variant>.safetensors`.
            verify: As in `from_pretrained`.
        """
        views = open_tensors(source, spec.config, hub_kwargs, variant, verify)
        tensors = with_base(source, views, spec.config, hub_kwargs)
        organ, missing = cls.load_tensors(spec, tensors, dtype, *model_args, source=source, **kwargs)
        organ.config.name_or_path = source
        organ.config.digests = organ.config.delta = None  # its tensors may change
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
        """Build a donor from tensors, strictly.

        Args:
            spec: Checked config of the donor.
            tensors: Tensors or lazy views by their names in a checkpoint.
            dtype: dtype of the donor; `"auto"`: the most frequent one.
            source: Source of the tensors, for errors.
            partial: Accept missing tensors, for one shard of a checkpoint.
            foreign: Accept unexpected tensors, which old checkpoints of a base may have.
            **kwargs: As in `fill`.

        Returns:
            The donor, and the names of missing tensors.

        Raises:
            CorruptDonorError: As in `from_pretrained`.
        """
        if not partial:
            refuse(source, expert_problems(tensors))
            stored = sum(math.prod(tensor.shape) for tensor in tensors.values())
            kwargs["max_values"] = MAX_VALUES_PER_STORED * stored + MAX_VALUES_BESIDE
        organ, info = cls.fill(spec, tensors, dtype, *model_args, source=source, **kwargs)
        refuse(source, loading_problems(info, partial, foreign))
        state = organ.state_dict().items()
        refuse(source, [f"non-finite values in {name}" for name, t in state if not (t.is_meta or is_finite(t))])
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
        """Build a donor and load the tensors that fit. Other arguments as in `load_tensors`.

        Args:
            quantization: The base's `quantization_config`, which transformers uses to dequantize the tensors.
            **kwargs: As in `PreTrainedModel.from_pretrained`.

        Returns:
            The donor, and transformers' `output_loading_info` for `loading_problems`.

        Raises:
            CorruptDonorError: There are no tensors, or they cannot be converted to the layout of the modules.
        """
        if not tensors:
            raise CorruptDonorError(f"{source}: the checkpoint holds no tensors")
        if dtype in (None, "auto"):
            dtype = common_dtype(tensors)
        config = spec.config
        if quantization is not None:
            config = copy.deepcopy(config)
            config.quantization_config = quantization  # transformers removes it after dequantizing
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": dtype}
        options |= {"config": config, "spec": spec, "state_dict": dict(tensors)}
        try:
            with upstream.built_whole(), upstream.without_load_report():
                loaded: Any = super().from_pretrained(None, *model_args, **options, **kwargs)
        except RuntimeError as error:  # from transformers' conversion of the tensors
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
        delta: str | None = None,
        rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Save `config.json`, `model.safetensors`, the card and, for a local base, its tokenizer.

        Args:
            save_directory: Folder; created if missing.
            is_main_process: Whether this process writes files.
            state_dict: Tensors to save instead of the donor's own, by the same names.
            push_to_hub: Also push to `repo_id` (default: the folder's name).
            max_shard_size: Size above which the weights are sharded.
            delta: Store the change of the base's layers, and read it together with them: `"low_rank"`, each matrix as
                a product of that `rank` (default: 64); or `"bfloat16"`, rounded.
            rank: Rank of the products.
            **kwargs: As in `PreTrainedModel.save_pretrained` and `push_to_hub`.

        Raises:
            CorruptDonorError: A tensor is empty, on the meta device or not finite; nothing is written.
            NotHFError: No delta can be made, or it would be no smaller.
        """
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        push_kwargs = {key: kwargs.pop(key) for key in PushOptions.__annotations__ if key in kwargs}
        kwargs |= {"max_shard_size": max_shard_size, "delta": plan_delta(delta, rank, self.config, push_to_hub)}
        write_donor(self, save_directory, is_main_process, state_dict, **kwargs)
        if push_to_hub:
            self.push_to_hub(repo_id, max_shard_size=max_shard_size, delta=delta, rank=rank, **push_kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "5GB",
        delta: str | None = None,
        rank: int | None = None,
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push the donor and its card as one commit. Arguments as in `save_pretrained` and transformers.

        Raises:
            NotHFError: The repo holds another kind of model.
            OSError: The Hub refuses the push or cannot be reached; the repo is unchanged.
        """
        planned, token = plan_delta(delta, rank, self.config, is_pushed=True), options.get("token")
        inherit_license(self.config, revision=self.config.base_revision, token=token)

        def save(folder: str, repo_id: str) -> None:
            write_donor(self, folder, repo_id=repo_id, delta=planned, token=token, max_shard_size=max_shard_size)

        return push_folder(save, repo_id, self.model_tags, **options)
