"""Layers of every architecture are cut out and stand for themselves, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from not_hf import DonorModel, UnsupportedArchitectureError
from testing.donors import SPAN, moved, same, transplanted_class
from testing.models import ARCHITECTURES, ENCODERS, PRE_NORM, logits, tiny_model

EVERY = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (*ARCHITECTURES, *ENCODERS)]
every = pytest.mark.parametrize("model_type", EVERY)


@every
def test_replacing_layers_by_themselves_changes_nothing(model_type, token_ids):
    base = tiny_model(model_type)
    before = logits(base, token_ids)
    model = transplanted_class(base).from_pretrained(base, DonorModel.from_base(base, SPAN, mode="replace"))
    assert model is base and isinstance(model, transplanted_class(base)) and model.active_donors == ["default"]
    assert torch.equal(logits(model, token_ids), before)


@every
def test_an_identity_organ_is_a_no_op_or_refused_behind_the_norms_of_encoders(model_type, token_ids):
    base = tiny_model(model_type)
    if model_type in ENCODERS and model_type not in PRE_NORM:
        with pytest.raises(UnsupportedArchitectureError, match="use init='copy'"):
            DonorModel.from_base(base, SPAN, init="identity")
        return
    before = logits(base, token_ids)
    model = transplanted_class(base).from_pretrained(base, DonorModel.from_base(base, SPAN, init="identity"))
    assert model.config.num_hidden_layers == 6
    assert torch.equal(logits(model, token_ids), before)


@every
def test_an_organ_alone_continues_the_hidden_states_of_the_base(model_type, token_ids):
    base = tiny_model(model_type)
    mask = torch.ones_like(token_ids)
    mask[0, slice(-3, None) if model_type in ENCODERS else slice(3)] = 0  # padding, of decoders on the left
    inputs = {"attention_mask": mask} | ({} if model_type in ENCODERS else {"use_cache": False})
    donor = DonorModel.from_base(base, SPAN)
    with torch.no_grad():
        hidden = base(token_ids, output_hidden_states=True, **inputs).hidden_states
        out = donor(inputs_embeds=hidden[SPAN[0]], attention_mask=mask).last_hidden_state
    assert torch.equal(out[mask.bool()], hidden[SPAN[1]][mask.bool()])


@every
def test_cut_from_a_folder_saved_and_loaded_by_itself(model_type, token_ids, base_folder, tmp_path):
    folder = base_folder(model_type)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    auto_class = AutoModelForMaskedLM if model_type in ENCODERS else AutoModelForCausalLM
    base = auto_class.from_pretrained(folder)
    donor = DonorModel.from_base(folder, SPAN)
    assert same(donor, DonorModel.from_base(base, SPAN))
    model = transplanted_class(base).from_pretrained(base, moved(donor, 1), position=3)
    model.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    assert isinstance(again, transplanted_class(base)) and again.donor_config["default"].position == 3
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    organ = AutoModel.from_pretrained(tmp_path)
    assert isinstance(organ, DonorModel) and same(organ, donor)
