"""Stacks whose last layers take keys and values of others, and stacks whose layers have inputs of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from not_hf import (
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
    check_compatibility,
)
from not_hf.architecture.sharing import first_sharing, source_of
from not_hf.architecture.splicing import place_attributes, splice_config
from testing.donors import organ, same
from testing.generation import generate
from testing.models import exact_logits, tiny_config, tiny_model
from testing.shapes import in_matrix
from testing.training import trained

SLIDING, FULL = "sliding_attention", "full_attention"
SHARING = {"num_hidden_layers": 8, "layer_types": [SLIDING, FULL] * 4, "num_kv_shared_layers": 4}
PER_LAYER_INPUTS = {**SHARING, "hidden_size_per_layer_input": 8}
pytestmark = pytest.mark.skipif(not in_matrix("gemma4_text"), reason="this release of transformers has no gemma4_text")


def sharing(**overrides) -> PreTrainedModel:
    """Layers 4 to 7 take keys and values of layers 2 and 3."""
    model = tiny_model("gemma4_text", **SHARING, **overrides)
    model.config.output_hidden_states = True  # else transformers expects that layers have inputs of their own
    return model


def lives(base: PreTrainedModel, donor: DonorModel, ids: torch.Tensor, folder, **place) -> None:
    """Check that a cache follows an organ, that it is merged into a native model, and that it leaves no trace."""
    bare, config = exact_logits(base, ids), copy.deepcopy(vars(base.config))
    model = TransplantedForCausalLM.from_pretrained(copy.deepcopy(base), donor, **place)
    expected = exact_logits(model, ids)
    assert not torch.equal(expected, bare) and torch.equal(generate(model), generate(model, use_cache=False))
    with model.disable_donors():
        assert torch.equal(exact_logits(model, ids), bare)
    copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
    assert torch.equal(exact_logits(AutoModelForCausalLM.from_pretrained(folder), ids), expected)
    native = model.unload()
    assert same(native, base) and vars(native.config) == config
    assert [*map(place_attributes, native.model.layers)] == [*map(place_attributes, base.model.layers)]


@pytest.mark.parametrize("model_type", in_matrix("gemma4_text", "gemma3n_text"))
def test_sources_are_those_of_the_live_model(model_type):
    model = tiny_model(model_type, **({"hidden_size_per_layer_input": 8} | SHARING if "4" in model_type else {}))
    config, layers = model.config, [layer.self_attn for layer in model.model.layers]
    first = first_sharing(config)
    assert [each.is_kv_shared_layer for each in layers] == [n >= first for n in range(len(layers))]
    stores = {n for n, each in enumerate(layers) if each.store_full_length_kv}
    assert {source_of(config, n) for n in range(first, len(layers))} <= stores
    index = getattr(layers[-1], "kv_shared_layer_index", None)  # of older releases
    assert index in (None, source_of(config, len(layers) - 1))


@pytest.mark.parametrize(
    ("span", "position", "mode"),
    [
        ((0, 2), 2, "insert"),
        ((2, 6), 2, "replace"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (((1, 2), 3, "insert"), ((2, 4), 2, "replace"), ((0, 2), 2, "replace"))
        ),
    ],
)
def test_an_organ_below_the_sharing_layers_or_with_their_sources(span, position, mode, token_ids, tmp_path):
    base = sharing()
    lives(base, organ(base, 1, span, position=position, mode=mode), token_ids, tmp_path)


@pytest.mark.parametrize("span", [(5, 6), (3, 5), (6, 8)])
def test_a_span_that_cuts_a_pair_apart_is_refused(span):
    with pytest.raises(
        UnsupportedArchitectureError, match=r"layer \d takes those of layer \d, which is not among these layers"
    ):
        DonorModel.from_base(sharing(), span, mode="replace")


@pytest.mark.parametrize(
    ("span", "position", "mode", "reason", "fitting"),
    [
        ((0, 2), 4, "insert", "layer 4 takes those of layer 2, and would take those of another", "0, 1, 2"),
        ((0, 1), 3, "insert", "layer 4 takes those of layer 2, and would take those of another", "0, 1, 2"),
        ((1, 3), 2, "replace", "layer 4 takes those of layer 2, and would take those of another", "0, 1"),
        ((0, 2), 6, "insert", "no layer that has its own can stand behind them", "0, 1, 2"),
    ],
)
def test_a_splice_that_changes_a_pair_is_refused(span, position, mode, reason, fitting):
    base = sharing()
    (problem,) = check_compatibility(organ(base, 1, span), base, position, mode)
    assert reason in problem and problem.endswith(f"at position {position}; fitting positions: {fitting}")


def test_another_organ_does_not_become_the_source():
    """One replaces the source, and one of the same type stands behind it."""
    config = tiny_config("gemma4_text", **SHARING)
    other = tiny_config("gemma4_text", layer_types=[SLIDING, FULL] * 2)
    stack = [(config, n) for n in range(8)]
    stack[2:4] = [(other, 0), (other, 1)]
    assert splice_config(config, stack)["num_kv_shared_layers"] == 4
    for place in (2, 4):
        with pytest.raises(UnsupportedArchitectureError, match="would take those of another"):
            splice_config(config, [*stack[:place], (other, 2), (other, 3), *stack[place:]])


@pytest.mark.parametrize(
    ("model_type", "span"), [("gemma4_text", (1, 3)), ("gemma4_text", (2, 8)), ("gemma3n_text", (1, 4))]
)
def test_layers_with_inputs_of_their_own_are_replaced_in_place(model_type, span, token_ids, tmp_path):
    base = tiny_model(model_type, **(PER_LAYER_INPUTS if model_type == "gemma4_text" else {}))
    donor = organ(base, 1, span, mode="replace")
    lives(base, donor, token_ids, tmp_path / "merged")
    donor.save_pretrained(tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), donor)


def test_layers_with_inputs_of_their_own_go_nowhere_else(tmp_path):
    base = tiny_model("gemma3n_text")
    for place in ({}, {"mode": "replace", "position": 2}, {"mode": "replace", "init": "identity"}):
        with pytest.raises(NotHFError, match="use mode='replace', position=1 and init='copy'"):
            DonorModel.from_base(base, (1, 2), **place)
    donor = organ(base, 1, (1, 2), mode="replace")
    for place in ({"mode": "insert"}, {"position": 0}):
        with pytest.raises(IncompatibleDonorError, match="use mode='replace' and position=1"):
            TransplantedForCausalLM.from_pretrained(base, donor, **place)
    with pytest.raises(UnsupportedArchitectureError, match="which only a whole model computes"):
        donor(inputs_embeds=torch.zeros(1, 3, 32))
    base.save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match="has inputs for 4 layers"):
        TransplantedForCausalLM.from_pretrained(tmp_path, donor, scaffold="minimal")


@pytest.mark.slow
def test_training_starts_above_no_source(tmp_path):
    base = tiny_model("gemma4_text", **PER_LAYER_INPUTS)

    def recipient(span: tuple[int, int]) -> PreTrainedModel:
        donor = DonorModel.from_base(base, span, mode="replace")
        return TransplantedForCausalLM.from_pretrained(copy.deepcopy(base), donor, is_trainable=True)

    cached, whole, plain = (
        trained(tmp_path / str(n), recipient((1, 3)), **options)
        for n, options in enumerate(({"cache_prefix": True}, {"head_chunk": 0}, {"cls": Trainer}))
    )
    assert cached[0] == pytest.approx(plain[0], abs=1e-3) and whole[0] == plain[0]
    with pytest.raises(UnsupportedArchitectureError, match=r"cannot run in parts.*use transformers.Trainer"):
        trained(tmp_path / "above", recipient((3, 4)))


def test_a_prompt_is_read_up_to_the_first_source(token_ids):
    base = tiny_model("gemma4_text", **PER_LAYER_INPUTS)
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1, (3, 4), mode="replace"))
    assert torch.equal(generate(model, prefill=model.prefill(token_ids, depth=2)), generate(model))
    with pytest.raises(UnsupportedArchitectureError, match="cannot run in parts"):
        model.prefill(token_ids)  # up to layer 3; layer 2 is a source
