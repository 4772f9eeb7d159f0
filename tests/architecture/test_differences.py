"""What layers differ in, in words."""

from __future__ import annotations

from torch import nn

from not_hf.architecture.differences import describe, native_differences
from testing.models import tiny_model


def test_differences_name_the_layer_the_module_and_both_values():
    ours, natives = tiny_model("llama").model.layers[:2], tiny_model("llama").model.layers[:2]
    assert native_differences(list(map(describe, ours)), list(map(describe, natives))) == []
    width = ours[1].mlp.up_proj.in_features
    ours[0].self_attn.scaling = 0.5
    ours[1].hidden_size = 7
    ours[1].mlp.up_proj = nn.Linear(width, 3, bias=False)
    ours[1].mlp.act_fn = nn.Tanh()
    native = natives[0]
    assert native_differences(list(map(describe, ours)), list(map(describe, natives)), "in the base") == [
        f"layer 0 self_attn.scaling is 0.5, in the base {native.self_attn.scaling!r}",
        f"layer 1 mlp.up_proj.weight has shape {(3, width)}, in the base {tuple(native.mlp.up_proj.weight.shape)}",
        f"layer 1 mlp.act_fn is Tanh, in the base {type(native.mlp.act_fn).__name__}",
        f"layer 1.hidden_size is 7, in the base {native.hidden_size}",
        f"layer 1 mlp.up_proj.out_features is 3, in the base {native.mlp.up_proj.out_features}",
    ]
