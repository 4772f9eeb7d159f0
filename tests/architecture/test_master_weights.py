"""The class of a layer that has float32 weights; what it computes is tested in `tests/recipient/`."""

from __future__ import annotations

import copy
import pickle

import torch

from not_hf.architecture.computed_weights import native_class, store_weights
from not_hf.architecture.master_weights import hold_master_weights
from testing.models import tiny_model


def test_a_layer_goes_by_its_native_name_and_becomes_native_again():
    layer = tiny_model("llama").model.layers[0]
    native, attributes = type(layer), vars(layer).keys() - {"not_cast", "computes_in"}
    hold_master_weights(layer, ["mlp.up_proj.weight"], torch.bfloat16)
    for held in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        kind = type(held)
        assert kind is not native and native_class(held) is native
        assert (kind.__module__, kind.__qualname__, kind.__doc__) == (
            native.__module__,
            native.__qualname__,
            native.__doc__,
        )
        assert (held.not_cast, held.computes_in) == ({"mlp.up_proj.weight"}, torch.bfloat16)
    store_weights(layer)
    assert type(layer) is native and vars(layer).keys() == attributes
