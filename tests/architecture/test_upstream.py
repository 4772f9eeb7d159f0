"""What depends on private names of transformers, PyTorch and accelerate."""

from __future__ import annotations

import types

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import nn

from not_hf.architecture.upstream import foreign_hooks, rebind_forward


def look(module, args, out=None):
    return None


def output_capturing_hook(module, args, out):
    return None


class Steering(ModelHook):
    """A hook of the user's own, attached as accelerate does it."""


def other_forward(self, x):
    return -x


HOOKED = {
    "nothing": (lambda module: None, [], []),
    "before": (lambda module: module.register_forward_pre_hook(look), ["look"], ["look"]),
    "after": (lambda module: module.register_forward_hook(look), ["look"], []),
    "an object": (lambda module: module.register_forward_hook(nn.Tanh()), ["Tanh"], []),
    "of transformers": (lambda module: module.register_forward_hook(output_capturing_hook), [], []),
    "of accelerate": (lambda module: add_hook_to_module(module, AlignDevicesHook("cpu")), [], []),
    "beside accelerate's": (
        lambda module: add_hook_to_module(module, SequentialHook(AlignDevicesHook("cpu"), Steering())),
        ["Steering"],
        ["Steering"],
    ),
}


@pytest.mark.parametrize("attached", HOOKED)
def test_hooks_that_may_change_something_are_named(attached):
    attach, everywhere, before = HOOKED[attached]
    attach(module := nn.Linear(2, 2))
    assert foreign_hooks(module) == everywhere
    assert foreign_hooks(module, before_only=True) == before


@pytest.mark.parametrize("is_dispatched", [False, True])
def test_another_forward_counts_unless_the_caller_knows_of_it(is_dispatched):
    module = nn.Linear(2, 2)
    module.forward = types.MethodType(nn.Linear.forward, module)  # the class's own, bound once more
    assert foreign_hooks(module) == []
    module.forward = types.MethodType(other_forward, module)
    if is_dispatched:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    assert foreign_hooks(module) == ["other_forward"]
    assert foreign_hooks(module, keeps_forward=False) == []


@pytest.mark.parametrize("is_dispatched", [False, True])
def test_a_dispatched_module_follows_its_class(is_dispatched):
    class Negative(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    module = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    before = module(x)
    if is_dispatched:
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    module.__class__ = Negative
    rebind_forward(module)
    assert torch.equal(module(x), -before)
