"""Ways of fine-tuning that are compared: what each puts into a model, and how what it learned is scaled."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from not_hf.architecture.stack import layers_config
from not_hf.architecture.twin import meta_twin
from not_hf.cards.common import hub_id
from not_hf.composition.check import survey
from not_hf.composition.sources import DEFAULT_NAME, DonorLike
from not_hf.donor.modeling import DonorModel
from not_hf.errors import IncompatibleDonorError, UnsupportedArchitectureError, one_line
from not_hf.hub.headers import size_of
from not_hf.recipient.heads import class_of
from not_hf.training.trainer import DonorTrainer

Fresh = Callable[[], PreTrainedModel]  # returns the base, each time another copy


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained, or measured.

    Args:
        model: The base with what the method adds.
        set_scale: Moves the weights to base + scale · (trained − base).
        saved_bytes: Size of the tensors that are saved.
        trainer_class: What trains it.
        is_scalable: Whether it has other scales than 1.
    """

    model: Any
    set_scale: Callable[[float], None]
    saved_bytes: int
    trainer_class: type[Trainer] = Trainer
    is_scalable: bool = True


def prepare_organ(fresh: Fresh) -> Prepared:
    """Replace the output projections of all layers by an organ."""
    model = fresh()
    span = (0, layers_config(model.config).num_hidden_layers)
    donor = DonorModel.from_base(model, span, mode="replace", modules="outputs")
    recipient: Any = class_of(model).from_pretrained(model, donor, is_trainable=True)
    set_scale = functools.partial(recipient.set_donor_scale, DEFAULT_NAME)
    return Prepared(recipient, set_scale, _trained_bytes(recipient), DonorTrainer)


def lora_problem(config: PreTrainedConfig) -> str | None:
    """Say why there is no LoRA for models of a config; `None` if there is."""
    if find_spec("peft") is None:
        return "PEFT is not installed; pip install peft"
    twin = copy.deepcopy(meta_twin(layers_config(config)).model)
    try:
        _with_lora(twin)
    except ValueError as error:
        return f"PEFT refuses the model: {one_line(error, 300)}"
    return None


def prepare_lora(fresh: Fresh) -> Prepared:
    """Put LoRA of rank 16 on all linear layers; needs PEFT."""
    from peft.tuners.lora import LoraLayer

    model = _with_lora(fresh())
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def set_scale(scale: float) -> None:
        for layer in layers:
            layer.set_scale("default", scale)

    return Prepared(model, set_scale, _trained_bytes(model))


def prepare_full(fresh: Fresh) -> Prepared:
    """Make all parameters trainable."""
    model = fresh()
    model.requires_grad_(True)

    @functools.cache
    def ends() -> list[tuple[torch.Tensor, torch.Tensor]]:
        trained = [parameter.detach().clone() for parameter in model.parameters()]
        return list(zip(fresh().parameters(), trained, strict=True))

    @torch.no_grad()
    def set_scale(scale: float) -> None:
        for parameter, (begin, end) in zip(model.parameters(), ends(), strict=True):
            parameter.copy_(torch.lerp(begin.to(end.device), end, scale))

    return Prepared(model, set_scale, _trained_bytes(model))


def prepare_donor(donor: DonorLike, fresh: Fresh) -> Prepared:
    """Load the organ, or organs, of a donor as they are."""
    model = fresh()
    recipient: Any = class_of(model).from_pretrained(model, donor)
    scales = {name: recipient.donor_config[name].scale for name in recipient.active_donors}

    def set_scale(scale: float) -> None:
        for name, own in scales.items():
            recipient.set_donor_scale(name, own * scale)

    if isinstance(donor, DonorModel):
        size = sum(tensor.numel() * tensor.element_size() for tensor in donor.state_dict().values())
    else:
        size = sum(size_of(tensor) for organ in survey(donor)[1] for tensor in organ.tensors.values())
    return Prepared(recipient, set_scale, size, is_scalable=_is_scalable(recipient, set_scale))


def donor_names(donors: Iterable[DonorLike]) -> list[str]:
    """Name donors as they may be published: by Hub ID or folder name, with a number where that is not enough."""
    return numbered(["donor" if isinstance(each, DonorModel) else f"donor {public_name(each)}" for each in donors])


def numbered(names: list[str]) -> list[str]:
    """Put a number behind names that occur several times."""
    counted = [f"{name} ({names[: n + 1].count(name)})" for n, name in enumerate(names)]
    return [name if names.count(name) == 1 else number for name, number in zip(names, counted, strict=True)]


def public_name(source: str | os.PathLike[str]) -> str:
    """Return a Hub ID as it is, and of a local path the last part."""
    name = os.fspath(source)
    return hub_id(name) or os.path.basename(os.path.normpath(name))


def _with_lora(model: PreTrainedModel) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _is_scalable(recipient: Any, set_scale: Callable[[float], None]) -> bool:
    """Whether organs can have other scales than 1, and nothing beside their layers, which is not scaled."""
    if any(status.modules_to_save for status in recipient.get_donor_status().values()):
        return False
    try:
        set_scale(0.5)
    except (IncompatibleDonorError, UnsupportedArchitectureError):
        set_scale(1.0)
        return False
    return True


def _trained_bytes(model: Any) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(parameter.numel() * parameter.element_size() for parameter in trained)
