"""Every operation that changes a live model, interrupted at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from not_hf import TransplantedForCausalLM
from not_hf.recipient.mixin import Recipient
from testing.donors import tiny_organ
from testing.interrupting import interrupted
from testing.models import TOKEN_IDS, logits, tiny_model


def with_two_organs() -> TransplantedForCausalLM:
    """Both are scaled, and the first is trainable."""
    model = TransplantedForCausalLM.from_pretrained(
        tiny_model("llama"), tiny_organ(1), donor_name="a", position=2, is_trainable=True
    )
    model.load_donor(tiny_organ(2), "b", position=0)
    model.set_donor_scale("a", 0.5)
    return model


def without_donors(model: TransplantedForCausalLM) -> None:
    with model.disable_donors(), model.disable_donors():
        pass


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "disable_donors": without_donors,
    "set_donor": lambda model: model.set_donor("b"),
    "set_donor_scale": lambda model: model.set_donor_scale("a", 0.25),
    "load_donor": lambda model: model.load_donor(tiny_organ(3), "c", position=1),
    "hotswap_donor": lambda model: model.hotswap_donor("a", tiny_organ(3)),
    "add_weighted_donor": lambda model: model.add_weighted_donor(["a", "b"], [0.5, 0.5], "c"),
    "delete_donor": lambda model: model.delete_donor("a"),
    "to": lambda model: model.to(torch.float64),
    "unload": lambda model: model.unload(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload, disabled": lambda model: merged_inside(model),
}


def merged_inside(model: TransplantedForCausalLM) -> None:
    with model.disable_donors():
        model.merge_and_unload()


def state_of(model: PreTrainedModel) -> list[Any]:
    """Everything that a change could change, so that two states can be compared."""
    active = model.active_donors if isinstance(model, Recipient) else None  # a use that repairs what is to be repaired
    state: list[Any] = [type(model), "_surgery" in vars(model), active, vars(model).get("model_tags")]
    state += [model.config.to_dict()]
    state += [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    state += [layer.self_attn.layer_idx for layer in model.model.layers]
    if isinstance(model, Recipient):
        state += [list(model.donor_config)]
        state += [(organ.scale, organ.position) for organ in model.donor_config.values()]
    return [*state, logits(model, TOKEN_IDS).double().numpy().tobytes()]


def at_scale_one(model: PreTrainedModel) -> list[Any]:
    """The weights that would be saved."""
    if isinstance(model, Recipient):
        for name in model.donor_config:
            model.set_donor_scale(name, 1)
    return state_of(model)


def try_interrupts(operation: str, points: int | None, opcodes: bool = False) -> dict[str, int]:
    """Interrupt an operation at evenly spread points, or at all, and count what was found afterwards."""
    change, fresh = OPERATIONS[operation], with_two_organs()
    done = copy.deepcopy(fresh)
    interrupted(lambda: change(copy.deepcopy(fresh)))  # what is cached from now on takes no steps
    steps = interrupted(lambda: change(done), opcodes=opcodes)
    known = {"before": [state_of(fresh)], "after": [state_of(done)]}
    for name, model in (("before", fresh), ("after", done)):
        known[name].append(at_scale_one(copy.deepcopy(model)))
    found = dict.fromkeys(("before", "after", "neither"), 0)
    for step in range(0, steps, 1 if points is None else max(1, steps // points)):
        model = copy.deepcopy(fresh)
        interrupted(lambda model=model: change(model), step, opcodes)
        states = [state_of(model), at_scale_one(model)]
        found[next((name for name, each in known.items() if each == states), "neither")] += 1
    return found
