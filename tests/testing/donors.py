"""Organs and models with organs that tell each other apart, for tests that move them about."""

from __future__ import annotations

import copy

import torch

from not_hf import DonorModel, TransplantedForCausalLM
from not_hf.architecture.layers import output_projections
from testing.models import tiny_model


def organ(base, seed: int, layers=(1, 3), **options) -> DonorModel:
    """An organ whose every tensor is that seed's own."""
    donor = DonorModel.from_base(base, layers=layers, **options)
    with torch.no_grad():
        for n, parameter in enumerate(donor.parameters()):
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + n))
            )
    return donor


def scaled_by_hand(donor: DonorModel, scale: float) -> DonorModel:
    """A copy whose layers write `scale` times as much."""
    twin = copy.deepcopy(donor)
    with torch.no_grad():
        for layer in twin.stack.layers:
            for _, parameter in output_projections(layer):
                parameter.mul_(scale)
    return twin


def transplanted(*donors: tuple[str, DonorModel, dict]) -> TransplantedForCausalLM:
    """A tiny llama with organs: the name of each, the organ, and where it goes."""
    model = tiny_model("llama")
    for name, donor, place in donors:
        model = TransplantedForCausalLM.from_pretrained(model, donor, donor_name=name, **place)
    return model


def with_organs(base: str, *seeds: int) -> TransplantedForCausalLM:
    """The base with an organ per seed."""
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, seeds[0]), donor_name=f"organ{seeds[0]}")
    for seed in seeds[1:]:
        model.load_donor(organ(base, seed), f"organ{seed}")
    return model


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
