"""Organs that hold parts of layers: the recipient keeps the rest of its own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from not_hf import DonorConfig, DonorModel, NotHFError, TransplantedForCausalLM, average_donors, merge_donor
from testing.donors import SPAN, moved
from testing.models import TOKEN_IDS, tiny_model
from testing.shapes import in_matrix
from testing.training import made, rows


def parts_of(base, modules, seed: int = 1, **options) -> DonorModel:
    return moved(DonorModel.from_base(base, SPAN, mode="replace", modules=modules, **options), seed)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKEN_IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_only_parts_are_trained(model_type, tmp_path):
    base = tiny_model(model_type)
    model = TransplantedForCausalLM.from_pretrained(
        base, DonorModel.from_base(base, SPAN, mode="replace", modules="outputs"), is_trainable=True
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(any(word in name for word in ("o_proj", "down_proj", "c_proj")) for name in trained)
    made(model, tmp_path, rows(8), num_train_epochs=1, weight_decay=0.1).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained
    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForCausalLM.from_pretrained(tiny_model(model_type), tmp_path / "organ").eval()
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=1e-5, atol=1e-6)
    base = model.unload()
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(base), logits(tiny_model(model_type)))


def test_the_rest_is_the_recipients_own_also_when_it_moves():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, parts_of(base, ["q_proj", "mlp.up_proj"]), donor_name="a")
    layer, own = model.model.layers[1], model._surgery.base_layers[1]
    assert layer.self_attn.k_proj.weight is own.self_attn.k_proj.weight
    assert layer.self_attn.q_proj.weight is not own.self_attn.q_proj.weight
    for moving in (model.double(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer, own = moving.model.layers[1], moving._surgery.base_layers[1]
        assert layer.self_attn.k_proj.weight is own.self_attn.k_proj.weight
        assert layer.self_attn.q_proj.weight.dtype == own.self_attn.q_proj.weight.dtype == torch.float64


def test_master_weights_of_parts():
    base = tiny_model("llama").bfloat16()
    donor = DonorModel.from_base(base, SPAN, mode="replace", modules="outputs")
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    layer = model.model.layers[1]
    assert layer.self_attn.o_proj.weight.dtype == torch.float32
    assert layer.self_attn.q_proj.weight.dtype == layer.input_layernorm.weight.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(tiny_model("llama").bfloat16()))
    model(TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    assert layer.self_attn.o_proj.weight.grad.dtype == torch.float32
    native = model.merge_and_unload()
    assert {parameter.dtype for parameter in native.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_several_at_once_swapped_averaged_and_merged(base_folder, tmp_path):
    base = base_folder("llama")
    one, two = (parts_of(base, "outputs", seed) for seed in (1, 2))
    high = moved(DonorModel.from_base(base, (3, 4), mode="replace", modules="mlp"), 3)
    model = TransplantedForCausalLM.from_pretrained(base, one, donor_name="a")
    first = logits(model)
    model.load_donor(high, "high")
    both = logits(model)
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(TransplantedForCausalLM.from_pretrained(tmp_path / "both")), both)
    merged = merge_donor(tmp_path / "both", tmp_path / "merged")
    assert merged.built_because is None
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), both)
    model.hotswap_donor("a", two)
    model.set_donor("a")
    fresh = TransplantedForCausalLM.from_pretrained(base, two)
    assert torch.equal(logits(model), logits(fresh))
    model.hotswap_donor("a", one)
    assert torch.equal(logits(model), first)
    model.set_donor([])
    model.load_donor(two, "b")
    model.add_weighted_donor(["a", "b"], [1, 3], "mean")
    model.set_donor("mean")
    mean = average_donors([one, two], [1, 3])
    averaged = TransplantedForCausalLM.from_pretrained(base, mean)
    torch.testing.assert_close(logits(model), logits(averaged))
    shared = model.model.layers[1].self_attn.q_proj.weight
    assert shared is model._surgery.base_layers[1].self_attn.q_proj.weight
    ties = average_donors([one, two], [1, 1], "task_arithmetic")
    assert ties.num_parameters() == one.num_parameters()
    with pytest.raises(NotHFError, match=r"it holds modules='mlp' of these layers, not 'outputs'"):
        model.hotswap_donor("a", parts_of(base, "mlp"))


def test_only_the_bytes_of_parts_are_fetched(base_repo, cache, hub):
    donor = DonorModel.from_base(base_repo("llama"), SPAN, mode="replace", modules=["o_proj"])
    [part] = cache.rglob("*.safetensors")
    with safe_open(part, "pt") as file:
        assert set(file.keys()) == {f"model.layers.{n}.self_attn.o_proj.weight" for n in range(*SPAN)}
    live = DonorModel.from_base(tiny_model("llama"), SPAN, mode="replace", modules=["o_proj"])
    assert donor.state_dict().keys() == live.state_dict().keys()
    hub.requests.clear()
    again = DonorModel.from_base(base_repo("llama"), SPAN, mode="replace", modules=["mlp"])
    assert len(list(cache.rglob("*.safetensors"))) == 2 and again.num_parameters() != donor.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", in_matrix("llama", "mixtral"))
def test_a_second_cut_of_parts_reads_nothing(model_type, base_repo, cache, hub, tmp_path):
    where = {"mode": "replace", "modules": "outputs"}
    first = moved(DonorModel.from_base(base_repo(model_type), SPAN, **where), 1)
    hub.requests.clear()
    again = DonorModel.from_base(base_repo(model_type), SPAN, **where)
    assert not [record for record in hub.requests if "safetensors" in record.path]
    hub.requests.clear()
    offline = DonorModel.from_base(base_repo(model_type), SPAN, local_files_only=True, **where)
    first.save_pretrained(tmp_path, delta="bfloat16")
    for _ in range(2):
        hub.requests.clear()
        restored = DonorModel.from_pretrained(tmp_path)
    DonorModel.from_pretrained(tmp_path, local_files_only=True)
    assert not [record for record in hub.requests if "safetensors" in record.path]
    for ours, theirs in zip(again.parameters(), offline.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(restored.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    [kept] = cache.rglob("layers-*.json")
    kept.write_text("damaged")
    assert DonorModel.from_base(base_repo(model_type), SPAN, **where).num_parameters() == first.num_parameters()


@pytest.mark.parametrize("model_type", in_matrix("mamba2"))
def test_layers_without_a_branch_have_no_such_parts(model_type):
    with pytest.raises(NotHFError, match="no layer has 'mlp'; modules of these layers are"):
        parts_of(tiny_model(model_type), "mlp")


def test_what_a_donor_of_parts_cannot_do_is_refused(tmp_path):
    base = tiny_model("llama")
    for options, said in (
        ({"modules": "outputs"}, r"modules='outputs' needs mode='replace' and init='copy'"),
        ({"modules": "outputs", "mode": "replace", "init": "identity"}, "needs mode='replace'"),
        ({"modules": "heads", "mode": "replace"}, "modules must be one of"),
        ({"modules": [], "mode": "replace"}, "modules must be one of"),
        (
            {"modules": ["no_proj"], "mode": "replace"},
            r"no layer has 'no_proj'; modules of these layers are self_attn",
        ),
    ):
        with pytest.raises(NotHFError, match=said):
            DonorModel.from_base(base, SPAN, **options)
    donor = parts_of(base, "outputs")
    with pytest.raises(NotHFError, match="cannot run alone; transplant it"):
        donor(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(NotHFError, match=r"holds parts of layers \(modules='outputs'\); use mode='replace'"):
        TransplantedForCausalLM.from_pretrained(base, donor, mode="insert")
    with pytest.raises(NotHFError, match="layer_types"):
        sliding = tiny_model("gemma3_text")
        TransplantedForCausalLM.from_pretrained(sliding, parts_of(sliding, "mlp"), position=2)
    donor.save_pretrained(tmp_path)
    config = DonorConfig.from_pretrained(tmp_path)
    assert (
        config.modules == "outputs"
        and "the output matrices of these layers" in Path(tmp_path, "README.md").read_text()
    )
    for wrong, said in (("attention", "missing .*q_proj"), ("all", "missing .*norm")):
        config.modules = wrong
        config.save_pretrained(tmp_path)
        with pytest.raises(NotHFError, match=said):
            DonorModel.from_pretrained(tmp_path)
