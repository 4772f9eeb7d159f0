"""`DonorModel`: cut, load, save and push a donor."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Unpack

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from not_hf.architecture import upstream
from not_hf.architecture.layers import silence
from not_hf.architecture.part_names import ALL, Modules
from not_hf.cards.license import inherited_licenses
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor.cutting import LiveBase, StoredBase, cut_config, open_base
from not_hf.donor.delta import plan_delta, with_base
from not_hf.donor.filled import FilledModel
from not_hf.donor.generation_config import read_generation_config
from not_hf.donor.loading import open_tensors
from not_hf.donor.saved_modules import Indices, base_stack, choose_modules, cut_modules
from not_hf.donor.saving import write_donor
from not_hf.errors import UnsupportedArchitectureError, one_line
from not_hf.hub.checkpoint import hollow
from not_hf.hub.consistent_read import read_steadily
from not_hf.hub.push import PushOptions, push_folder


class DonorModel(FilledModel):
    """A donor: `k` layers of a causal or masked LM, without embeddings, head or final norm unless they are named.

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

    _generation_config: GenerationConfig | None = None  # that of the repo, for the next save

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike[str] | PreTrainedModel,
        layers: Sequence[int],
        position: int | None = None,
        mode: str = "insert",
        init: str = "copy",
        *,
        modules: Modules = ALL,
        modules_to_save: Sequence[str] | None = None,
        trainable_token_indices: Indices | None = None,
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
            modules: What the donor holds of each layer, for mode `"replace"`; the recipient keeps the rest of its
                layers. `"all"`; `"outputs"`, the matrices through which layers write to the residual stream;
                `"attention"` or `"mlp"`, that branch without the norm before it; or a list of names of modules, each
                the end of a path, as in PEFT's `target_modules`. From the Hub, only these bytes are fetched.
            modules_to_save: Names of modules beside the layers that the donor holds too, such as `"embed_tokens"`,
                `"lm_head"` or a classifier. In a recipient they are trained with the layers, and stand in the place of
                the recipient's own while the organ is active, also if they have rows for more tokens.
            trainable_token_indices: Ids of tokens whose rows of the input embeddings the donor holds, as in PEFT; or a
                dict with ids by the name of the module. Where the head shares the embeddings' weight, it shares them.
            domain: Intended domain, free text.
            license: The Hub's identifier of the donor's licence; `None`: the licence on the base's card. For a live
                model that card is read only from the cache.
            dtype: dtype of the donor; `"auto"` keeps that of the checkpoint.
            **hub_kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            NotHFError: An argument is out of range, or the base has organs or adapters.
            UnsupportedArchitectureError: The base has no layers that can be cut, or `init="identity"` does not make
                them a no-op.
            OSError: The base cannot be read.

        Examples:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
            >>> donor = DonorModel.from_base(base, layers=(1, 3), mode="replace")
        """
        source = open_base(base, **hub_kwargs)
        if isinstance(source, StoredBase):
            source.require_no_adapter()
        config = cut_config(source, layers, position, mode, init, license, modules)
        config.domain = domain
        if modules_to_save is not None or trainable_token_indices is not None:
            choose_modules(config, base_stack(source), modules_to_save, trainable_token_indices)
        name, live = source.name or "the live model", isinstance(source, LiveBase)
        tensors, beside = cls._cut(source, config), cut_modules(source, config)
        if source.quantization is not None and dtype == "auto":
            dtype = source.config.dtype or dtype  # the tensors are packed blocks and their scales
        options: dict[str, Any] = {"name": name, "foreign": not live, "quantization": source.quantization}
        return cls.from_tensors(source, config, tensors, dtype, beside=beside, **options)

    @classmethod
    def _cut(cls, source: LiveBase | StoredBase, config: DonorConfig) -> Mapping[str, Any]:
        """Return the tensors of a span that a donor of this config holds, as `LiveBase.tensors` does."""
        if config.modules == ALL:
            return source.tensors(config.span)
        prefix, spec = f"{cls.base_model_prefix}.", config.check()
        if isinstance(source, LiveBase):
            with upstream.built_whole(hollow=True), torch.device("meta"):
                held = cls(config, spec=spec).state_dict().keys()
            return {name: each for name, each in source.tensors(config.span).items() if f"{prefix}{name}" in held}
        headers = hollow(source.headers(config.span))
        with upstream.without_progress_bar():
            state = {f"{prefix}{name}": each for name, each in headers.items()}
            _, info = cls.fill(spec, state, source=source.name, device_map="meta", quantization=source.quantization)
        return source.tensors(
            config.span, {name for name in headers if f"{prefix}{name}" not in info["unexpected_keys"]}
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
        beside: Mapping[str, Any] = MappingProxyType({}),
        foreign: bool = False,
        quantization: dict[str, Any] | None = None,
    ) -> DonorModel:
        """Build a donor from tensors of a base, apply `init`, and check that it runs without the rest of the base.

        Args:
            base: The base. If it is live, the donor is put on the device of its layers.
            config: The donor's config.
            tensors: Tensors or lazy views by their names in the base model, with layers numbered from 0.
            dtype: As in `load_tensors`, like `foreign` and the errors.
            name: Source of the tensors, for errors.
            beside: Tensors of modules beside the layers, by their names in a checkpoint.
            foreign: Accept unexpected tensors.
            quantization: As in `fill`.
        """
        state = {f"{cls.base_model_prefix}.{key}": tensor for key, tensor in tensors.items()} | dict(beside)
        options: dict[str, Any] = {"source": name, "foreign": foreign, "quantization": quantization}
        options["attn_implementation"] = upstream.attention_of(base.config) if isinstance(base, LiveBase) else None
        organ, _ = cls.load_tensors(config.check(), state, dtype, **options)
        if isinstance(base, LiveBase):
            nn.Module.to(organ, next(base.stack.layers[config.span[0]].parameters()).device)
        if config.modules != ALL:
            return organ
        hidden = torch.randn(1, 4, base.config.hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
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
            organ, missing = cls.load_files(
                described.check(), source, hub_kwargs, dtype, *model_args, verify=verify, **kwargs
            )
            organ._generation_config = read_generation_config(source, hub_kwargs)
            return organ, missing

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
        organ.config.name_or_path = organ.name_or_path = source
        organ.config.digests = organ.config.delta = None  # its tensors may change
        return organ, missing

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
            is_main_process: Whether this process writes files, and pushes.
            state_dict: Tensors to save instead of the donor's own, by the same names.
            push_to_hub: Also push to `repo_id` (default: the folder's name).
            max_shard_size: Size above which the weights are sharded.
            delta: Store the change of the base's layers, and read it together with them: `"low_rank"`, each matrix as
                a product of that `rank` (default: 64); or `"bfloat16"`, rounded.
            rank: Rank of the products.
            **kwargs: `dtype`, that of the files or its name (default: the donor's own); others as in
                `PreTrainedModel.save_pretrained` and `push_to_hub`.

        Raises:
            CorruptDonorError: A tensor is empty, on the meta device or, in that dtype, not finite; nothing is written.
            NotHFError: `state_dict` has other names, no delta can be made, or it would be no smaller.
        """
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        push_kwargs: Any = {key: kwargs.pop(key) for key in PushOptions.__annotations__ if key in kwargs}
        kwargs |= {"max_shard_size": max_shard_size, "delta": plan_delta(delta, rank, self.config, push_to_hub)}
        kwargs |= {"tensors": state_dict, "token": push_kwargs.get("token")}
        kwargs["generation_config"] = self._generation_config
        write_donor(self, save_directory, is_main_process, **kwargs)
        if push_to_hub and is_main_process:
            self._push(repo_id, kwargs, push_kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        dtype: str | torch.dtype | None = None,
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
        of_files: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "token": options.get("token")}
        of_files["delta"] = plan_delta(delta, rank, self.config, is_pushed=True)
        of_files["generation_config"] = self._generation_config
        return self._push(repo_id, of_files, options)

    def _push(self, repo_id: str, of_files: dict[str, Any], options: PushOptions) -> CommitInfo:
        """Push what `write_donor` writes with the arguments `of_files`."""

        def save(folder: str, repo_id: str) -> None:
            write_donor(self, folder, repo_id=repo_id, **of_files)

        with inherited_licenses([self.config], options.get("token")):
            return push_folder(save, repo_id, self.model_tags, **options)

    @torch.no_grad()
    def _make_identity(self, hidden: torch.Tensor) -> None:
        """Silence every layer, then check that hidden states pass unchanged."""
        try:
            for layer in list(self.stack.layers):
                silence(layer, functools.partial(self.written_by, layer, hidden))
            silent = torch.equal(self(inputs_embeds=hidden).last_hidden_state, hidden)
        except Exception as error:  # a native forward may raise anything
            reason = one_line(error, 200)
            raise UnsupportedArchitectureError(f"these layers cannot be run without their base: {reason}") from error
        if not silent:
            raise UnsupportedArchitectureError(
                f"layers of model_type {self.organ.config.model_type!r} are not a no-op even when their output "
                "projections or the norms behind them are zero; use init='copy'"
            )
