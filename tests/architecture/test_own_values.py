"""Layers that have config values of their own (`per_layer_config`), as those of Gemma 4 with full attention."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from local_hub import Hub
from not_hf import DonorModel, IncompatibleDonorError, TransplantedForCausalLM, check_compatibility
from not_hf.architecture.differences import config_differences
from not_hf.architecture.splicing import own_values, splice_config, spliced_config
from testing.cuts import weights
from testing.donors import organ, same
from testing.generation import generate
from testing.models import exact_logits, tiny_config, tiny_model
from testing.shapes import in_matrix

SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = {"layer_types": [SLIDING, FULL] * 2}
pytestmark = pytest.mark.skipif(not in_matrix("gemma4_text"), reason="this release of transformers has no gemma4_text")


def overrides(config) -> dict[int, dict]:
    return {int(n): values for n, values in config.to_dict().get("per_layer_config", {}).items()}


@pytest.mark.parametrize("model_type", in_matrix("gemma4_text", "gemma4_unified_text", "dots3_note_text"))
def test_values_move_with_their_layers(model_type):
    config = tiny_config(model_type)
    own = {n: overrides(config).get(n) for n in range(4)}
    if not any(own.values()):
        pytest.skip("configs of this release of transformers have no such values")
    for places in ([1, 2], [0, 0, 1, 2, 3, 3], [2, 3], [0, 1]):
        spliced = spliced_config(config, [(config, n) for n in places])
        assert overrides(spliced) == {n: own[i] for n, i in enumerate(places) if own[i]}
        before = copy.deepcopy(vars(config))
        for key, value in own_values(config, splice_config(config, [(config, n) for n in places])).items():
            setattr(spliced, key, value)
        assert vars(spliced) == before == vars(config)


@pytest.mark.slow
def test_a_span_may_end_in_a_layer_in_which_no_model_ends(tmp_path, caplog):
    """Config classes of Gemma 4 make the last layer a full one."""
    base = tiny_model("gemma4_text", **ALTERNATING)
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path)
    again = DonorModel.from_pretrained(tmp_path)
    assert again.organ.config.layer_types == [FULL, SLIDING] and same(again, donor)
    assert not config_differences(again.organ.config, donor.organ.config) and "Forcing" not in caplog.text
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))  # (batch, seq, hidden)
    assert torch.equal(again(inputs_embeds=hidden).last_hidden_state, donor(inputs_embeds=hidden).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    scaffold = TransplantedForCausalLM.from_pretrained(tmp_path / "base", donor, scaffold="minimal")
    assert scaffold.config.layer_types == [FULL, SLIDING] and scaffold(torch.tensor([[1, 5]])).logits.isfinite().all()
    with pytest.raises(
        IncompatibleDonorError,
        match=r"last layer of model_type 'gemma4_text' must be full_attention, and here it is sliding_attention.* at "
        r"position 4; fitting positions: 0, 1, 2, 3$",
    ):
        TransplantedForCausalLM.from_pretrained(base, donor, position=4)


def test_heads_are_compared_by_type_of_layer():
    base = tiny_model("gemma4_text", **ALTERNATING)
    other = tiny_config("gemma4_text", **ALTERNATING, global_head_dim=24)
    sliding, full = (organ(base, 1, span, position=1) for span in ((0, 1), (1, 2)))
    assert check_compatibility(sliding, base) == [] == check_compatibility(full, base)
    assert not overrides(other) or check_compatibility(sliding, other) == []
    problem, *_ = check_compatibility(full, other)
    assert re.match("donor (global_)?head_dim 16 does not fit recipient (global_)?head_dim 24", problem)


def test_of_a_recipient_without_layers_of_that_type():
    base = tiny_model("gemma4_text")
    only_full = tiny_model("gemma4_text", layer_types=[FULL] * 4)
    problems = check_compatibility(organ(base, 1, (0, 1)), only_full)
    assert any("donor layer_types ['sliding_attention'] have no rotary embedding" in each for each in problems)
    model = TransplantedForCausalLM.from_pretrained(only_full, organ(only_full, 1, (2, 3)))
    assert torch.equal(generate(model), generate(model, use_cache=False))


@pytest.mark.slow
def test_cut_from_the_hub_and_loaded_by_id(hub: Hub, token_ids, tmp_path):
    base = tiny_model("gemma4_text", **ALTERNATING)
    base.push_to_hub("me/tiny-gemma-4")
    hub.requests.clear()
    donor = DonorModel.from_base("me/tiny-gemma-4", (1, 3))
    assert weights(hub) and all(record.range for record in weights(hub))
    assert same(donor, DonorModel.from_base(base, (1, 3)))
    organ(base, 1).push_to_hub("me/tiny-organ")
    model = TransplantedForCausalLM.from_pretrained("me/tiny-gemma-4", "me/tiny-organ")
    expected = exact_logits(model, token_ids)
    assert torch.equal(
        exact_logits(TransplantedForCausalLM.from_pretrained(base, organ(base, 1)), token_ids), expected
    )
    model.merge_and_unload().save_pretrained(tmp_path)
    assert torch.equal(exact_logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), expected)
