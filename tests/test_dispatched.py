"""Recipients that accelerate dispatched: layers offloaded to disk and CPU, hooks that move what they are given."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from architectures import tiny_model
from organs import organ, same
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM

OUTSIDE = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
LAYERS = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "model.layers.3": "cpu"}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture
def offloaded(base_folder, tmp_path):
    """A recipient whose layers 1 and 2 lie on disk."""
    return AutoModelForCausalLM.from_pretrained(
        base_folder("llama"), device_map={**OUTSIDE, **LAYERS}, offload_folder=tmp_path / "offloaded"
    )


def expected(base, donor, ids, **place):
    recipient = AutoModelForCausalLM.from_pretrained(base)
    return logits(TransplantedForCausalLM.from_pretrained(recipient, donor, **place), ids)


@pytest.mark.parametrize(("position", "mode"), [(0, "insert"), (2, "insert"), (4, "insert"), (1, "replace")])
def test_organs_stand_among_offloaded_layers(position, mode, offloaded, base_folder, token_ids, tmp_path):
    donor, place = organ(base_folder("llama"), 1), {"position": position, "mode": mode}
    before, devices = logits(offloaded, token_ids), dict(offloaded.hf_device_map)
    after = expected(base_folder("llama"), donor, token_ids, **place)
    model = TransplantedForCausalLM.from_pretrained(offloaded, donor, **place)
    assert torch.equal(logits(model, token_ids), after)
    stack = [model.hf_device_map[f"model.layers.{n}"] for n in range(model.config.num_hidden_layers)]
    own = [LAYERS[f"model.layers.{n}"] for n in range(4)]
    own[position : position + (2 if mode == "replace" else 0)] = ["cpu", "cpu"]
    assert stack == own and not any(p.is_meta for p in model.model.layers[position].parameters())
    with model.disable_donors():
        assert model.hf_device_map == devices and torch.equal(logits(model, token_ids), before)
    options = {"attention_mask": torch.ones_like(token_ids), "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(model.generate(token_ids, **options), model.generate(token_ids, use_cache=False, **options))
    model.hotswap_donor("default", donor)
    model.save_pretrained(tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), donor)
    native = model.unload()
    assert type(native) is LlamaForCausalLM and native.hf_device_map == devices
    assert torch.equal(logits(native, token_ids), before)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_an_offloaded_recipient_can_be_merged(offloaded, base_folder, token_ids, tmp_path):
    donor = organ(base_folder("llama"), 1)
    model = TransplantedForCausalLM.from_pretrained(offloaded, donor)
    model.set_donor_scale("default", 0.5)
    after = logits(model, token_ids)
    native = model.merge_and_unload()
    assert torch.equal(logits(native, token_ids), after)
    native.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), token_ids), after)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_what_accelerate_offloads_by_itself(way, base_folder, token_ids, tmp_path):
    base = tiny_model("gpt2")
    donor = organ(base, 1)
    after = logits(TransplantedForCausalLM.from_pretrained(tiny_model("gpt2"), donor), token_ids)
    if way == "cpu_offload":
        cpu_offload(base, execution_device="cpu")
    elif way == "disk_offload":
        disk_offload(base, tmp_path, execution_device="cpu")
    else:
        base = dispatch_model(base, {"transformer": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    before = logits(base, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, donor)
    assert torch.equal(logits(model, token_ids), after)
    model.load_donor(donor, "again", position=0)
    model.delete_donor("again")
    assert torch.equal(logits(model, token_ids), after)
    assert torch.equal(logits(model.unload(), token_ids), before)


def test_a_pipeline_places_base_and_organ(base_folder, tmp_path):
    organ(base_folder("llama"), 1).save_pretrained(tmp_path)
    plain, placed = (
        pipeline("text-generation", model=str(tmp_path), **options)("w5 w6", max_new_tokens=4, do_sample=False)
        for options in ({}, {"device_map": "auto"})
    )
    assert plain == placed


def test_a_recipient_without_weights_is_refused():
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_model("llama").config)
    with pytest.raises(NotHFError, match="has no weights"):
        TransplantedForCausalLM.from_pretrained(base, organ(tiny_model("llama"), 1))
    assert type(base) is LlamaForCausalLM
