"""A cache that one stack has filled, and another is given."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache

from not_hf import NotHFError
from not_hf.architecture.releases import cache_argument
from testing.donors import tiny_organ, transplanted


@torch.no_grad()
@pytest.mark.parametrize("given", [True, False])
def test_a_cache_that_a_stack_of_another_shape_has_filled_is_refused(given, token_ids):
    model = transplanted(("a", tiny_organ(1), {"position": 1}), ("b", tiny_organ(2), {"position": 3}))
    model.set_donor("a")
    name = cache_argument(model)
    expected = model(token_ids).logits[:, -1]
    cache = model(token_ids[:, :-1], use_cache=True, **({name: DynamicCache()} if given else {}))[name]
    for names in ([], "b", ["a", "b"]):
        model.set_donor(names)
        with pytest.raises(NotHFError, match=r"filled while other organs were inserted.*begin a new one"):
            model(token_ids[:, -1:], **{name: cache})
    model.set_donor("a")
    torch.testing.assert_close(model(token_ids[:, -1:], **{name: cache}).logits[:, -1], expected)


@torch.no_grad()
def test_a_cache_is_noticed_wherever_it_goes_in_and_comes_out(token_ids):
    """By position, and in a tuple."""
    model = transplanted(("a", tiny_organ(1), {"position": 1}))
    place = list(inspect.signature(model.forward).parameters).index(cache_argument(model))
    cache = model(token_ids, use_cache=True, return_dict=False)[1]
    with model.disable_donors(), pytest.raises(NotHFError, match="filled while other organs were inserted"):
        model(token_ids[:, -1:], *[None] * (place - 1), cache)


@torch.no_grad()
def test_an_organ_at_the_same_place_goes_on_from_a_cache(token_ids):
    """As another adapter of PEFT does."""
    model = transplanted(*((name, tiny_organ(n), {"position": 1}) for n, name in enumerate("ab")))
    model.set_donor("a")
    name = cache_argument(model)
    cache = model(token_ids, use_cache=True)[name]
    model.set_donor("b")
    assert model(token_ids[:, -1:], **{name: cache}).logits.shape == (2, 1, 96)
