"""Organs and models with organs that tell each other apart, for tests that move them about."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from not_hf import (
    DonorModel,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
)
from not_hf.architecture.layers import output_projections
from not_hf.architecture.stack import find_stack, is_encoder
from testing.models import tiny_model

SPAN = (1, 3)


def moved(donor: DonorModel, seed: int) -> DonorModel:
    """The donor, its every tensor moved as that seed says, so that it matters wherever it stands."""
    with torch.no_grad():
        for n, parameter in enumerate(donor.parameters()):
            generator = torch.Generator().manual_seed(100 * seed + n)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return donor


def edit_json(file: Path, **values: Any) -> None:
    """Put values into a JSON file; `a__b` is key `b` of `a`."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        *outer, last = [key] if key.startswith("_") else key.split("__")
        inner = content
        for name in outer:
            inner = inner[name]
        inner[last] = value
    file.write_text(json.dumps(content))


def organ(base: PreTrainedModel | str | Path, seed: int, layers: tuple[int, int] = SPAN, **options) -> DonorModel:
    """Layers of a base, every tensor that seed's own; those of a folder are cut once, if it is as it was."""
    if isinstance(base, PreTrainedModel) or not Path(base).is_dir():
        return moved(DonorModel.from_base(base, layers, **options), seed)
    files = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(Path(base).rglob("*"))]
    return moved(copy.deepcopy(_cut(str(base), layers, pickle.dumps(options), tuple(files))), seed)


def tiny_organ(seed: int, model_type: str = "llama", layers: tuple[int, int] = SPAN, **options) -> DonorModel:
    """The same of a tiny base, which is cut once."""
    return moved(copy.deepcopy(_cut(model_type, layers, pickle.dumps(options))), seed)


@functools.lru_cache(maxsize=64)
def _cut(base: str, layers: tuple[int, int], options: bytes, files: tuple | None = None) -> DonorModel:
    """Cut layers of a folder with these files; without them, of a tiny base of that model type."""
    return DonorModel.from_base(tiny_model(base) if files is None else base, layers, **pickle.loads(options))


def transplanted_class(base: PreTrainedModel) -> type[TransplantedForCausalLM | TransplantedForMaskedLM]:
    """That of a recipient like this base."""
    return TransplantedForMaskedLM if is_encoder(base.config) else TransplantedForCausalLM


def scaled_by_hand(donor: DonorModel, scale: float, replaced: DonorModel | None = None) -> DonorModel:
    """A copy whose layers write `scale` times as much; of layers in place of `replaced`, that far from these."""
    twin = copy.deepcopy(donor)
    with torch.no_grad():
        if replaced is not None:
            for parameter, start in zip(twin.parameters(), replaced.parameters(), strict=True):
                parameter.copy_(start + scale * (parameter - start))
            return twin
        for layer in twin.stack.layers:
            for _, parameter in output_projections(layer):
                parameter.mul_(scale)
    return twin


def grafted(base: PreTrainedModel, donor: DonorModel) -> PreTrainedModel:
    """A copy of the base with the donor's tensors in the layers that it was cut from, put there by name."""
    native = copy.deepcopy(base)
    layers = find_stack(native).layers
    for name, tensor in donor.named_parameters():
        n, _, inner = name.removeprefix(f"{donor.stack.full_path}.").partition(".")
        layers[int(n) + donor.config.span[0]].get_parameter(inner).data = tensor.detach().clone()
    return native


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


Tensors = Mapping[str, torch.Tensor]


def same(ours: torch.nn.Module | Tensors, theirs: torch.nn.Module | Tensors) -> bool:
    """Whether two models, or two of what `state_dict` gives, have the same tensors by the same names, bit for bit."""
    mine, other = (each if isinstance(each, Mapping) else each.state_dict() for each in (ours, theirs))
    return mine.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in mine.items()
    )


def holds(repo_id: str, model: DonorModel | TransplantedForCausalLM, **where) -> bool:
    """Whether what loads from a repo is that organ, or that model with its organs, bit for bit."""
    return same(type_of(model).from_pretrained(repo_id, **where), model)


def type_of(model: torch.nn.Module) -> type:
    """What loads a repo of such a model: an organ, or a base with its organs."""
    return DonorModel if isinstance(model, DonorModel) else AutoModelForCausalLM


def weights(model: TransplantedForCausalLM, name: str = "default") -> dict[str, torch.Tensor]:
    """Copies of an organ's tensors in a model, by layer and name."""
    layers = model._surgery.organs[name].layers
    return {f"{n}.{key}": t.clone() for n, layer in enumerate(layers) for key, t in layer.state_dict().items()}
