"""Combine organs of a model into a new one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from not_hf.architecture.differences import fingerprint
from not_hf.architecture.layers import computes
from not_hf.architecture.upstream import is_partitioned
from not_hf.config import DonorConfig
from not_hf.donor.averaging import BaseLike, Combination, base_layers, combined, combined_config
from not_hf.errors import NotHFError
from not_hf.recipient.organ import Organ
from not_hf.recipient.surgery import Surgery


def average(
    surgery: Surgery,
    organs: Sequence[Organ],
    weights: Sequence[float] | None,
    name: str,
    combination: Combination,
    base: BaseLike | None = None,
) -> Organ:
    """Combine organs into a new one in the place of the first, which is frozen and inactive.

    Other arguments and errors as in `average_donors`.
    """
    if holding := [organ.name for organ in organs if organ.saved]:
        raise NotHFError(
            f"organ {holding[0]!r} holds modules beside its layers, which are not combined in a model; "
            "combine the donors with average_donors()"
        )
    weights = combination.weights_of(len(organs), weights)
    config = combined_config([organ.config for organ in organs])
    states = [organ.state() for organ in organs]
    at_one = [
        {key: organ.at_scale_one(key, tensor) for key, tensor in state.items()}
        for organ, state in zip(organs, states, strict=True)
    ]
    layers_of_base = _layers_of_base(surgery, organs, combination, base) if combination.needs_base else None
    tensors = combined(at_one, weights, combination, layers_of_base)
    first = organs[0]
    parameters = nn.ModuleList(first.layers).named_parameters()
    memo: dict[int, Any] = {id(each): each for key, each in parameters if key in first.kept}  # stay the recipient's
    layers = copy.deepcopy(nn.ModuleList(first.layers), memo)
    layers.load_state_dict(tensors, strict=not first.kept)
    averaged = Organ(name, config, config.check(), list(layers), active=False)
    averaged.kept, averaged.replaced = first.kept, first.replaced
    averaged.set_trainable(False)
    return averaged


def _layers_of_base(
    surgery: Surgery, organs: Sequence[Organ], combination: Combination, base: BaseLike | None
) -> Mapping[str, torch.Tensor]:
    """Return the tensors of the layers that organs were cut from: the recipient's if it is their base, else read."""
    configs = [organ.config for organ in organs]
    if base is None and all(_is_base(surgery, config) for config in configs):
        layers = nn.ModuleList(surgery.base_layers[slice(*configs[0].span)])
        state, expected = layers.state_dict(), organs[0].state().keys()
        state = {name: tensor for name, tensor in state.items() if name not in organs[0].kept}
        is_plain = not is_partitioned(layers) and all(computes(each) and not each.is_meta for each in state.values())
        if is_plain and state.keys() == expected:  # neither quantized nor offloaded, and without LoRA
            return state
    donor = base_layers(configs, combination.combination_type, base)
    prefix = f"{donor.stack.full_path}."
    return {key.removeprefix(prefix): tensor for key, tensor in donor.state_dict().items()}


def _is_base(surgery: Surgery, config: DonorConfig) -> bool:
    """Whether a donor was cut from the recipient; of a model in memory without a name, its config must suffice."""
    if surgery.is_scaffold:
        return False
    name = surgery.base_config.name_or_path or None
    here = (name, surgery.base_revision, surgery.base_subfolder)
    there = (config.base_model_name_or_path, config.base_revision, config.base_subfolder)
    return here == there and (name is not None or config.fingerprint == fingerprint(surgery.base_config))
