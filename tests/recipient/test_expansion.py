"""Silent copies of layers, spread over a stack."""

from __future__ import annotations

import pytest
import torch

from not_hf import expand
from testing.models import TOKEN_IDS, logits, tiny_model


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_all_copies_are_held_in_one_dtype_and_change_nothing(autocast, dtype):
    base = tiny_model("llama").bfloat16()
    before = logits(base, TOKEN_IDS)
    model = expand(base, 3, is_trainable=True, autocast_donor_dtype=autocast)
    assert torch.equal(logits(model, TOKEN_IDS), before)
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {dtype}
