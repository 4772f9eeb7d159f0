"""Organs as PEFT's LoRA adapters, and adapters as organs. PEFT is imported when they are made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from not_hf.architecture.differences import describe, native_differences
from not_hf.architecture.quantization import is_quantized
from not_hf.architecture.upstream import HUB_KWARGS, SHARED_KWARGS, require_known
from not_hf.cards.common import README, named_base, render, updated, warn_once
from not_hf.donor.cutting import StoredBase, layer_pattern, open_base
from not_hf.donor.delta import low_rank
from not_hf.donor.modeling import DonorModel
from not_hf.errors import (
    CorruptDonorError,
    IncompatibleDonorError,
    NotHFError,
    UnsupportedArchitectureError,
    one_line,
    some,
)
from not_hf.hub.adapter_files import fetch_adapter
from not_hf.hub.atomic_write import replacing
from not_hf.recipient.mixin import Recipient
from not_hf.recipient.organ import Organ
from not_hf.recipient.saving import require_own_modules
from not_hf.recipient.surgery import Surgery

_PEFT = "base_model.model."  # before the names of modules in PEFT's files


@dataclass(frozen=True)
class LoraMatrix:
    """How well a low-rank product holds the change of one matrix.

    Args:
        name: Name of the module in the recipient.
        error: Norm (Frobenius) of what is lost, as a share of the change's norm; 0 at full rank.

    Examples:
        >>> from not_hf import LoraMatrix
        >>> LoraMatrix("model.layers.8.mlp.down_proj", error=0.12).error
        0.12
    """

    name: str
    error: float


@torch.no_grad()
def to_lora(
    model: PreTrainedModel,
    donor_name: str,
    save_directory: str | os.PathLike[str],
    rank: int = 16,
    *,
    with_norms: bool = True,
) -> list[LoraMatrix]:
    """Save an organ that replaces layers as a LoRA adapter for the recipient, which PEFT, vLLM or llama.cpp can load.

    Each matrix of the organ less that of the recipient is approximated by a product of that rank, by singular value
    decomposition. Norms that differ are saved whole, among the adapter's `modules_to_save`. The folder's card is
    updated, as with donors.

    Args:
        model: A transplanted model; it is not changed.
        donor_name: Name of the organ.
        save_directory: Folder of the adapter; created if missing.
        rank: Rank of the products; that of a smaller matrix is full.
        with_norms: `False` leaves norms out, with a warning: many servers accept no `modules_to_save`.

    Returns:
        For each matrix that differs from the recipient's, how much of the change is lost.

    Raises:
        NotHFError: There is no organ of that name, the rank is not positive, the recipient is quantized or a scaffold,
            or the folder holds a model or a card that cannot be read.
        IncompatibleDonorError: The organ is inserted, or differs in structure from the layers that it replaces.
        UnsupportedArchitectureError: A change is neither in a matrix, a bias nor a norm (experts in one tensor).
        OSError: The folder cannot be written; it is as it was.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, TransplantedForCausalLM, to_lora
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3), mode="replace")
        >>> donor.stack.layers[0].attn.c_proj.weight.data += 0.1
        >>> model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="kjv")
        >>> [matrix.name for matrix in to_lora(model, "kjv", "kjv-lora", rank=1)]
        ['transformer.h.1.attn.c_proj']
    """
    from peft import LoraConfig

    if not isinstance(model, Recipient):
        raise NotHFError(f"{type(model).__name__} has no organs; give a TransplantedForCausalLM")
    surgery = model._surgery
    organ = _exportable(model, donor_name, save_directory, rank)
    adapter = _adapter(surgery, organ, surgery.stack(model).full_path, rank, with_norms)
    if not adapter.matrices:
        raise NotHFError(f"organ {donor_name!r} has the recipient's own matrices; there is nothing to save")
    if adapter.left_out:
        warn_once(f"the adapter leaves out changes of norms and biases: {some(adapter.left_out)}")
    base = surgery.base_config.name_or_path
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[matrix.name for matrix in adapter.matrices],
        modules_to_save=adapter.norms or None,
        lora_bias=adapter.has_bias,
        fan_in_fan_out=adapter.is_conv,
        base_model_name_or_path=base or None,
        revision=surgery.base_revision,
        task_type="CAUSAL_LM" if model.can_generate() else None,
        inference_mode=True,
    )
    card = _card(save_directory, base, rank, adapter.matrices)
    with replacing(save_directory) as draft:
        config.save_pretrained(draft)
        files = {f"{_PEFT}{key}": tensor.contiguous().cpu() for key, tensor in adapter.tensors.items()}
        Path(draft, "adapter_model.safetensors").write_bytes(safetensors.torch.save(files, {"format": "pt"}))
        card.save(Path(draft, README))
    return adapter.matrices


@torch.no_grad()
def from_lora(
    base: str | os.PathLike[str] | PreTrainedModel,
    adapter: str | os.PathLike[str],
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    **hub_kwargs: Any,
) -> DonorModel:
    """Make an organ of a LoRA adapter: the layers that it adapts, in their own place, with the adapter merged.

    Args:
        base: Base of the adapter: a folder, a Hub ID or a live model.
        adapter: Folder or Hub ID of the adapter.
        adapter_revision: Branch, tag or commit of the adapter's repo.
        adapter_subfolder: Folder of the adapter within its repo.
        **hub_kwargs: `revision` and `subfolder` of the base; `token`, `cache_dir`, `force_download`,
            `local_files_only` for both repos.

    Returns:
        A donor that replaces these layers.

    Raises:
        NotHFError: It is no LoRA or an activated one, or it adapts parameters by name, modules outside the layers, or
            layers that do not stand side by side.
        CorruptDonorError: Its tensors do not fit the base.
        OSError: A repo cannot be read.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import from_lora
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> config = LoraConfig(target_modules=["c_proj"], layers_to_transform=[1, 2], fan_in_fan_out=True)
        >>> get_peft_model(base, config).save_pretrained("kjv-lora")
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> from_lora(base, "kjv-lora").config.layers
        [1, 3]
    """
    from peft import PeftConfig, PeftType, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import load_peft_weights
    from peft.utils.other import get_pattern_key

    require_known(hub_kwargs, HUB_KWARGS)
    name, shared = os.fspath(adapter), {key: value for key, value in hub_kwargs.items() if key in SHARED_KWARGS}
    if isinstance(base, PreTrainedModel):  # which has no repo: they are for the adapter's
        hub_kwargs = {key: value for key, value in hub_kwargs.items() if key not in shared}
    folder = fetch_adapter(name, revision=adapter_revision, subfolder=adapter_subfolder or "", **shared)
    config: Any = PeftConfig.from_pretrained(folder)
    if config.peft_type != PeftType.LORA:
        raise NotHFError(f"{name} is an adapter of type {config.peft_type.value}; only LoRA can be made an organ")
    if getattr(config, "alora_invocation_tokens", None):
        raise NotHFError(f"{name} is an activated LoRA, which adapts a part of each text; an organ adapts all of it")
    if names_of := getattr(config, "target_parameters", None):
        raise NotHFError(
            f"{name} adapts parameters by name ({some(names_of)}), which cannot be made an organ; merge it with PEFT, "
            "and cut the organ from the merged model"
        )
    source = open_base(base, **hub_kwargs)
    prefixes = source.prefixes if isinstance(source, StoredBase) else (source.stack.base,)
    pattern = layer_pattern(prefixes, source.path)
    weights = load_peft_weights(folder, "cpu")
    found = {key: pattern.fullmatch(key.removeprefix(_PEFT)) for key in weights}
    if outside := [key for key, match in found.items() if match is None]:
        raise NotHFError(f"{name} adapts modules outside of the layers, which no organ holds: {some(outside)}")
    numbers = sorted({int(match[1]) for match in found.values() if match is not None})
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise NotHFError(f"{name} adapts layers {numbers}, which do not stand side by side")
    donor = DonorModel.from_base(base, (numbers[0], numbers[-1] + 1), mode="replace", **hub_kwargs)

    here, first = donor.stack.full_path, numbers[0]
    names = {
        key: f"{here}.{int(match[1]) - first}.{match[2].replace('.base_layer.', '.')}"  # a bias that was trained too
        for key, match in found.items()
        if match is not None
    }
    state = {names[key]: tensor for key, tensor in weights.items()}
    factors = {key: tensor for key, tensor in state.items() if ".lora_" in key}
    targets = {
        names[key].partition(".lora_")[0]: key.removeprefix(_PEFT).partition(".lora_")[0]
        for key in weights
        if ".lora_" in key
    }
    for pattern_of in (config.rank_pattern, config.alpha_pattern):  # by names in the base, as regular expressions
        resolved = {
            re.escape(target): pattern_of[known]
            for target, original in targets.items()
            if (known := get_pattern_key(pattern_of, original)) in pattern_of
        }
        pattern_of.clear()
        pattern_of |= resolved
    config.target_modules, config.modules_to_save = set(targets), None
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    whole = {key: tensor for key, tensor in state.items() if key not in factors}
    try:
        if unknown := whole.keys() - donor.state_dict().keys():
            raise ValueError(f"it has no place for {some(sorted(unknown))}")
        donor.load_state_dict(whole, strict=False)
        inject_adapter_in_model(config, donor)
        result: Any = set_peft_model_state_dict(donor, factors)
        if unknown := result.unexpected_keys:
            raise ValueError(f"it has no place for {some(sorted(unknown))}")
        for path, module in list(donor.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=True)
                donor.set_submodule(path, module.get_base_layer())
    except (RuntimeError, ValueError) as error:
        raise CorruptDonorError(f"{name} does not fit {source.name or 'its base'}: {one_line(error, 300)}") from error
    vars(donor).pop("peft_config", None)
    return donor.requires_grad_(True)


@dataclass(frozen=True)
class _Adapter:
    """What an adapter holds of an organ.

    Args:
        tensors: By name in the recipient.
        matrices: The matrices that differ.
        norms: Names of the norms that are saved whole.
        left_out: Names of modules whose norm or bias differs and is not saved.
        has_bias: Whether each matrix has a bias.
        is_conv: Whether the matrices are stored as `(in, out)`.
    """

    tensors: dict[str, torch.Tensor]
    matrices: list[LoraMatrix]
    norms: list[str]
    left_out: list[str]
    has_bias: bool
    is_conv: bool


def _adapter(surgery: Surgery, organ: Organ, stack: str, rank: int, with_norms: bool) -> _Adapter:
    """Approximate what an organ changes; raises `UnsupportedArchitectureError` for what is neither matrix nor norm."""
    tensors, biases = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    matrices: list[LoraMatrix] = []
    norms: list[str] = []
    is_conv = False
    for name, ours, theirs in _changed(surgery, organ, stack):
        changes = {
            key: p.float() - q.to(p.device).float()
            for (key, p), (_, q) in zip(*map(_own, (ours, theirs)), strict=True)
        }
        if isinstance(ours, nn.Linear | Conv1D):
            is_conv = is_conv or isinstance(ours, Conv1D)
            change = changes["weight"].T if isinstance(ours, Conv1D) else changes["weight"]  # (out, in)
            down, up, error = low_rank(change, rank)
            dtype = ours.weight.dtype
            tensors |= {f"{name}.lora_A.weight": down.to(dtype), f"{name}.lora_B.weight": up.to(dtype)}
            biases |= {name: changes["bias"].to(dtype)} if "bias" in changes else {}
            matrices.append(LoraMatrix(name, error))
        elif all(parameter.ndim == 1 for _, parameter in _own(ours)):
            norms.append(name)
            tensors |= {f"{name}.{key}": parameter.detach().clone() for key, parameter in _own(ours) if with_norms}
        else:
            raise UnsupportedArchitectureError(f"LoRA cannot hold the change of {name}, a {type(ours).__name__}")
    moved = [name for name, change in biases.items() if change.any()]
    has_bias = bool(moved) and len(biases) == len(matrices)
    if has_bias:
        tensors |= {f"{name}.lora_B.bias": change for name, change in biases.items()}
    left_out = ([] if has_bias else moved) + ([] if with_norms else norms)
    return _Adapter(tensors, matrices, norms if with_norms else [], left_out, has_bias, is_conv)


def _exportable(model: Recipient, donor_name: str, folder: str | os.PathLike[str], rank: int) -> Organ:
    """Return the organ to export, if it can be; raises as `to_lora`."""
    (name,) = model._named([donor_name])
    surgery = model._surgery
    if not isinstance(rank, int) or rank < 1:
        raise NotHFError(f"rank must be a positive number, got {rank!r}")
    organ = surgery.organs[name]
    surgery.require_layers("to_lora")
    if organ.config.mode != "replace":
        raise IncompatibleDonorError(
            f"organ {name!r} is inserted, and LoRA adds no layers; only mode 'replace' can be"
        )
    if is_quantized(model):
        raise NotHFError("the recipient is quantized; load it without quantization to compare its matrices")
    if os.path.exists(os.path.join(folder, CONFIG_NAME)):
        raise NotHFError(f"{folder} holds a model; choose another folder for the adapter")
    if organ.saved:
        raise NotHFError(
            f"organ {name!r} holds {', '.join(organ.saved.paths)} beside its layers; LoRA has layers only"
        )
    require_own_modules(surgery, organ)
    replaced = surgery.base_layers[organ.place.position :][: len(organ.layers)]
    ours, theirs = ([describe(layer) for layer in layers] for layers in (organ.layers, replaced))
    if differences := native_differences(ours, theirs, there="in the recipient"):
        raise IncompatibleDonorError(f"organ {name!r} differs in structure from what it replaces: {some(differences)}")
    return organ


def _changed(surgery: Surgery, organ: Organ, stack: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the modules of an organ whose own parameters differ from the recipient's, by their names there."""
    for n, layer in enumerate(organ.layers, organ.place.position):
        for (path, ours), (_, theirs) in zip(
            layer.named_modules(), surgery.base_layers[n].named_modules(), strict=True
        ):
            if any(
                not torch.equal(p, q.to(p.device)) for (_, p), (_, q) in zip(_own(ours), _own(theirs), strict=True)
            ):
                yield f"{stack}.{n}.{path}", ours, theirs


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _card(folder: str | os.PathLike[str], base: str | None, rank: int, matrices: list[LoraMatrix]) -> ModelCard:
    """Describe the adapter, with what is lost by matrix, in the card of its folder or a new one."""
    data = ModelCardData(base_model=named_base(base), library_name="peft", tags=["lora", "not_hf"])
    return updated(Path(folder, README), render("lora_card.md", data, rank=rank, matrices=matrices))
