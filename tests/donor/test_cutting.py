"""Layers of every architecture are cut out and stand for themselves, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
)

from not_hf import (
    CorruptDonorError,
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
)
from not_hf.architecture.stack import find_stack
from testing.donors import SPAN, moved, same, tiny_organ, transplanted, transplanted_class
from testing.models import exact_logits as logits
from testing.models import tiny_model
from testing.shapes import ARCHITECTURES, ENCODERS, PRE_NORM, broadly

every = broadly((*ARCHITECTURES, *ENCODERS))


@every
def test_replacing_layers_by_themselves_changes_nothing(model_type, token_ids):
    base = tiny_model(model_type)
    before = logits(base, token_ids)
    model = transplanted_class(base).from_pretrained(base, DonorModel.from_base(base, SPAN, mode="replace"))
    assert model is base and isinstance(model, transplanted_class(base)) and model.active_donors == ["default"]
    assert torch.equal(logits(model, token_ids), before)


@every
def test_an_identity_organ_is_a_no_op_or_refused_where_norms_stand_in_the_residual_stream(model_type, token_ids):
    base = tiny_model(model_type)
    if model_type == "minimax" or (model_type in ENCODERS and model_type not in PRE_NORM):
        with pytest.raises(UnsupportedArchitectureError, match="use init='copy'"):
            DonorModel.from_base(base, SPAN, init="identity")
        return
    before = logits(base, token_ids)
    model = transplanted_class(base).from_pretrained(base, DonorModel.from_base(base, SPAN, init="identity"))
    assert model.config.num_hidden_layers == 6
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "gemma3_text", "olmo2", "glm4", "exaone4"])
def test_an_identity_organ_takes_small_steps(model_type, token_ids):
    """A norm behind zeroed projections would blow up the first step, however small, to full size."""
    base = tiny_model(model_type)
    donor = DonorModel.from_base(base, SPAN, init="identity")
    model = transplanted_class(base).from_pretrained(base, donor, is_trainable=True)
    before = logits(model, token_ids)
    model(token_ids, labels=token_ids).loss.backward()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None])
    torch.optim.AdamW(learning, lr=1e-4, weight_decay=0).step()
    moved = (logits(model, token_ids) - before).norm() / before.norm()
    assert 0 < norm < 10 and 0 < moved < 0.05


@every
def test_an_organ_alone_continues_the_hidden_states_of_the_base(model_type, token_ids):
    base = tiny_model(model_type)
    mask = torch.ones_like(token_ids)
    mask[0, slice(-3, None) if model_type in ENCODERS else slice(3)] = 0  # padding, of decoders on the left
    inputs = {"attention_mask": mask} | ({} if model_type in ENCODERS else {"use_cache": False})
    donor = DonorModel.from_base(base, SPAN)
    entries = []  # hidden states at the entry of each layer
    for layer in find_stack(base).layers:
        catch = lambda _, args, kwargs: entries.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        layer.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        base(token_ids, **inputs)
        out = donor(inputs_embeds=entries[SPAN[0]], attention_mask=mask).last_hidden_state
    assert torch.equal(out[mask.bool()], entries[SPAN[1]][mask.bool()])


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


def test_cutting_from_a_model_with_organs_is_refused():
    with pytest.raises(NotHFError, match="has organs"):
        DonorModel.from_base(transplanted(("a", tiny_organ(1), {})), (0, 1))


@pytest.mark.parametrize("layers", [np.array([1, 3]), (np.int64(1), np.int64(3)), range(1, 3), [1, 3]])
def test_spans_and_positions_may_be_any_integers(layers):
    donor = DonorModel.from_base(tiny_model("llama"), layers, position=np.int64(0))
    assert donor.config.layers == [1, 3] and len(donor.stack.layers) == 2
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, position=np.int32(4))
    assert model.donor_config["default"].position == 4
    json.loads(model.donor_config["default"].to_json_string())


def test_layers_that_know_their_place_work_where_they_were_cut(token_ids):
    """gpt2 can scale attention by the layer's number; diffllama has a lambda that depends on it."""
    diffllama = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("diffllama", **{**ARCHITECTURES["llama"], "vocab_size": 96, "pad_token_id": 0})
    ).eval()
    for base in (tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), diffllama):
        before = logits(base, token_ids)
        donor = DonorModel.from_base(base, (1, 3), mode="replace")
        with torch.no_grad():
            hidden = base(token_ids, output_hidden_states=True, use_cache=False).hidden_states
            assert torch.equal(donor(inputs_embeds=hidden[1]).last_hidden_state, hidden[3])
        model = TransplantedForCausalLM.from_pretrained(base, donor)
        assert torch.equal(logits(model, token_ids), before)


def test_old_checkpoints_with_buffers_can_be_cut(tmp_path):
    """The Hub's gpt-neo checkpoints hold attention masks that today's class has no use for."""
    tiny_model("gpt_neo").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for n in range(4):
        tensors[f"transformer.h.{n}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old, live = DonorModel.from_base(tmp_path, (1, 3)), DonorModel.from_base(tiny_model("gpt_neo"), (1, 3))
    assert same(old, live)


def test_a_live_base_with_modules_of_its_own_is_not_cut_without_them():
    base = tiny_model("llama")
    base.model.layers[1].mlp.adapter = torch.nn.Linear(32, 32)
    with pytest.raises(CorruptDonorError, match=r"unexpected organ.layers.0.mlp.adapter"):
        DonorModel.from_base(base, (1, 3))
