"""The methods of a model with organs: what they refuse, and what they leave as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
)

from not_hf import (
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
)
from testing.donors import organ, tiny_organ, transplanted, with_organs
from testing.models import logits, tiny_model

A, B = tiny_organ(1, layers=(1, 2)), tiny_organ(2, layers=(0, 2))


@pytest.mark.parametrize("nothing", [None, [None], 3])
def test_what_names_no_organ_is_refused(nothing, tmp_path):
    model = transplanted(("a", A, {}), ("b", B, {}))
    for refuses in (model.set_donor, model.delete_donor):
        with pytest.raises((NotHFError, TypeError)):
            refuses(nothing)
    assert model.active_donors == ["a", "b"]
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(NotHFError, match="no organ is loaded or selected"):
            save(str(tmp_path / "new"), selected_donors=[])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("is_trainable", [False, True])
def test_only_a_trainable_organ_is_trainable_and_flags_come_back(is_trainable, capsys):
    base = tiny_model("llama")
    base.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    model = TransplantedForCausalLM.from_pretrained(base, A, is_trainable=is_trainable)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == (A.num_parameters() if is_trainable else 0)
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,d} || all params: {total:,d} || ")
    assert {name: p.requires_grad for name, p in model.unload().named_parameters()} == flags


def test_get_base_model_is_a_handle_of_the_native_class(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    base = model.get_base_model()
    assert type(base) is LlamaForCausalLM
    assert torch.equal(logits(base, token_ids), logits(model, token_ids))
    with model.disable_donors():
        assert torch.equal(logits(base, token_ids), logits(tiny_model("llama"), token_ids))


@pytest.mark.slow
def test_what_has_organs_in_it_does_not_go_by_the_name_of_its_base(token_ids, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = with_organs(tmp_path / "base", 1)
    view = model.get_base_model()
    with pytest.raises(NotHFError, match="has organs"):
        DonorModel.from_base(view, (4, 6))
    with pytest.raises(NotHFError, match="get_base_model"):
        TransplantedForCausalLM.from_pretrained(view, A)
    native = model.merge_and_unload()
    assert native.name_or_path == native.config.name_or_path == ""
    second = organ(native, 2, (4, 6))
    assert second.config.base_model_name_or_path is None
    model = TransplantedForCausalLM.from_pretrained(native, second)
    model.save_pretrained(tmp_path / "second")
    with pytest.raises(NotHFError, match="does not name its base"):
        TransplantedForCausalLM.from_pretrained(tmp_path / "second")
    expected = logits(model, token_ids)
    model.unload().save_pretrained(tmp_path / "merged")
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "merged", tmp_path / "second")
    assert torch.equal(logits(again, token_ids), expected)
    assert with_organs(tmp_path / "base", 1).unload().name_or_path == str(tmp_path / "base")


def test_unloading_merging_and_loading_inside_disable_donors(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    with model.disable_donors():
        model.load_donor(B, "b", position=2, mode="replace")
        assert model.active_donors == [] and len(model.model.layers) == 4
        with pytest.raises(IncompatibleDonorError, match="already replaced"):
            model.load_donor(B, "c", position=2, mode="replace")
    assert model.active_donors == ["a", "b"]
    expected = logits(model, token_ids)
    with model.disable_donors():
        native = model.merge_and_unload()
    assert type(native) is LlamaForCausalLM and torch.equal(logits(native, token_ids), expected)
    model = transplanted(("a", A, {"position": 1}))
    with model.disable_donors():
        native = model.unload()
    assert type(native) is LlamaForCausalLM
    assert torch.equal(logits(native, token_ids), logits(tiny_model("llama"), token_ids))


def test_a_copy_made_while_disabled_is_enabled(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    expected = logits(model, token_ids)
    base = logits(tiny_model("llama"), token_ids)
    with model.disable_donors():
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        copy.copy(model)  # shares everything, so it must change nothing
        assert model.active_donors == [] and torch.equal(logits(model, token_ids), base)
    for twin in twins:
        assert twin.active_donors == ["a"] and torch.equal(logits(twin, token_ids), expected)
        assert torch.equal(logits(twin.unload(), token_ids), base)


def test_dropout_does_not_stand_in_the_way_of_a_merge():
    base = tiny_model("gpt2")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3)))
    assert model.merge_and_unload().config.num_hidden_layers == 6
