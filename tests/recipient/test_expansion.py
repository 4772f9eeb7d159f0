"""Silent copies of layers, spread over a stack."""

from __future__ import annotations

import pytest
import torch

from not_hf import NotHFError, expand
from testing.donors import tiny_organ, transplanted
from testing.models import TOKEN_IDS, logits, tiny_model


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_all_copies_are_held_in_one_dtype_and_change_nothing(autocast, dtype):
    base = tiny_model("llama").bfloat16()
    before = logits(base, TOKEN_IDS)
    model = expand(base, 3, is_trainable=True, autocast_donor_dtype=autocast)
    assert torch.equal(logits(model, TOKEN_IDS), before)
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {dtype}


def test_a_model_with_organs_is_not_expanded():
    model = transplanted(("block1", tiny_organ(1), {}))
    model.set_donor([])
    with pytest.raises(NotHFError, match="the live model has organs, if inactive ones; unload"):
        expand(model, 2)
    assert list(model.donor_config) == ["block1"]
