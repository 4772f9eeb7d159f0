"""PEFT's LoRA on top of a transplanted model: saved, reloaded, folded in; wrapped recipients are refused."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
import torch
from huggingface_hub import HfApi
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoModelForCausalLM, pipeline

from not_hf import (
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
)
from testing import EXAMPLES
from testing.donors import edit_json, organ, tiny_organ, transplanted
from testing.models import logits, tiny_model

LORA = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def saved(base_folder, tmp_path):
    """Base, the folders of an organ and of a LoRA on top of it, and the model they are from."""
    base = base_folder("llama")
    organ(base, 1).save_pretrained(tmp_path / "organ")
    lora = get_peft_model(TransplantedForCausalLM.from_pretrained(base, tmp_path / "organ"), LORA).eval()
    lora.save_pretrained(tmp_path / "lora")
    return base, tmp_path / "organ", tmp_path / "lora", lora


@torch.no_grad()
def test_organ_first_then_the_adapter_gives_the_same_model(saved, token_ids):
    base, organ_folder, adapter, lora = saved
    again = PeftModel.from_pretrained(TransplantedForCausalLM.from_pretrained(base, organ_folder), adapter)
    assert torch.equal(again(token_ids).logits, lora(token_ids).logits)
    names = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert names == str(base)
    without = AutoPeftModelForCausalLM.from_pretrained(adapter)  # what docs/compatibility/peft-trl.md warns of
    assert not torch.allclose(without(token_ids).logits, lora(token_ids).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_a_scaled_organ_with_an_adapter_may_be_moved(mode, token_ids, tmp_path):
    model = transplanted(("default", tiny_organ(1, mode=mode), {}))
    model.set_donor_scale("default", 0.5)
    expected = logits(model, token_ids)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))  # which does nothing yet
    lora.half().float()
    loaded = logits(transplanted(("default", tiny_organ(1, mode=mode), {})).half().float(), token_ids)
    assert torch.allclose(logits(lora, token_ids), expected, atol=1e-2)
    model = lora.unload()
    model.save_pretrained(tmp_path)
    assert DonorModel.from_pretrained(tmp_path).config.scale == 0.5
    model.set_donor_scale("default", 1)
    assert torch.equal(logits(model, token_ids), loaded)
    again = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.allclose(logits(again, token_ids), expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("how", ["auto", "peft", "pipeline"])
def test_an_adapter_that_names_the_donor_as_its_base_loads_base_organ_and_adapter(saved, how, token_ids):
    base, organ_folder, adapter, lora = saved
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(organ_folder))
    if how == "pipeline":
        again = pipeline("text-generation", str(adapter), tokenizer=str(base)).model
    else:
        again = {"auto": AutoModelForCausalLM, "peft": AutoPeftModelForCausalLM}[how].from_pretrained(adapter)
    assert again.active_donors == ["default"] and torch.equal(again(token_ids).logits, lora(token_ids).logits)


@torch.no_grad()
def test_lora_folds_into_the_organ(saved, tmp_path, token_ids):
    _, organ_folder, _, lora = saved
    expected = lora(token_ids).logits
    model = lora.get_base_model()
    with pytest.raises(NotHFError, match="merge or unload"):
        model.save_pretrained(tmp_path / "folded")
    merged = lora.merge_and_unload()
    assert merged is model and torch.allclose(merged(token_ids).logits, expected, atol=1e-5)
    merged.save_pretrained(tmp_path / "folded")
    before, after = (DonorModel.from_pretrained(folder).state_dict() for folder in (organ_folder, tmp_path / "folded"))
    changed = {name.split(".")[-2] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"q_proj", "down_proj"}


@torch.no_grad()
def test_lora_stays_with_its_layers_when_organs_are_switched(saved, token_ids):
    *_, lora = saved
    expected = lora(token_ids).logits
    model = lora.get_base_model()
    bare = get_peft_model(tiny_model("llama"), LORA)
    with model.disable_donors():
        switched = lora(token_ids).logits
        inside = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert inside.keys() == {
        name.removeprefix("base_model.model.") for name, _ in bare.named_parameters() if "lora_" in name
    }
    assert not torch.allclose(switched, expected, atol=1e-3)
    assert torch.equal(lora(token_ids).logits, expected)


@pytest.mark.parametrize("how", ["wrapped", "inner", "injected"])
def test_a_recipient_or_a_base_with_adapters_is_refused(how, token_ids):
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (1, 3))
    wrapped = inject_adapter_in_model(LORA, base) if how == "injected" else get_peft_model(base, LORA)
    recipient = wrapped.get_base_model() if how == "inner" else wrapped
    with torch.no_grad():
        before = recipient(token_ids).logits
    with pytest.raises(NotHFError, match=r"has adapters or is wrapped; merge or unload"):
        TransplantedForCausalLM.from_pretrained(recipient, donor)
    with pytest.raises(NotHFError, match="not a PeftModel" if how == "wrapped" else "merge or unload .* then cut"):
        DonorModel.from_base(recipient, (1, 3))
    with torch.no_grad():
        assert torch.equal(recipient(token_ids).logits, before)


@pytest.mark.parametrize(("layers", "warns"), [([4], False), ([0, 4], True)])
def test_lora_that_is_merged_into_the_recipients_layers_is_not_saved_with_the_organ(layers, warns, tmp_path, caplog):
    model = transplanted(("a", tiny_organ(1), {"position": 3})).half().float()
    adapter = LoraConfig(target_modules=["q_proj"], layers_to_transform=layers, init_lora_weights=False)
    get_peft_model(model, adapter).merge_and_unload()
    model.save_pretrained(tmp_path)
    assert ("own layers were changed since it got organs" in caplog.text) is warns


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("place", ["folder", "repo"])
def test_a_recipient_or_a_base_by_name_with_an_adapter_beside_its_config_is_refused(place, tmp_path):
    """transformers loads both; an organ saved from that would name the model without the adapter as its base."""
    base, name = tiny_model("llama"), tmp_path
    donor = DonorModel.from_base(base, (1, 3))
    base.save_pretrained(tmp_path)
    get_peft_model(base, LORA).save_pretrained(tmp_path)
    if place == "repo":
        name = HfApi().create_repo("me/with-adapter").repo_id
        edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=name)
        HfApi().upload_folder(repo_id=name, folder_path=tmp_path)
    for use in (lambda: TransplantedForCausalLM.from_pretrained(name, donor), lambda: organ(name, 1)):
        with pytest.raises(NotHFError, match=r"holds an adapter \(LoRA\); merge it, save"):
            use()


def test_organs_under_lora_are_not_averaged(token_ids):
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (1, 3))
    model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="a")
    model.load_donor(donor, "b")
    get_peft_model(model, LORA)
    with pytest.raises(NotHFError, match="modules that are not its own"):
        model.add_weighted_donor(["a", "b"], None, "mean")
    assert list(model.donor_config) == ["a", "b"]


@pytest.mark.slow
def test_the_example_runs(base_folder, tmp_path, monkeypatch, capsys):
    example = EXAMPLES / "lora_on_organ.py"
    options = ["--base", str(base_folder("llama")), "--layers", "1", "3", "--prompt", "w5 w6 w7 w8"]
    monkeypatch.setattr(sys, "argv", [str(example), *options, "--output", str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")
    assert "loss after reloading" in capsys.readouterr().out
    assert DonorModel.from_pretrained(tmp_path / "folded").config.layers == [1, 3]


def test_lora_on_top_of_an_organ(token_ids, tmp_path):
    model = transplanted(("a", tiny_organ(1), {"position": 1}))
    before = logits(model, token_ids)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.equal(logits(lora, token_ids), before)
    with pytest.raises(NotHFError, match="not its own"):
        model.save_pretrained(tmp_path / "organ")
    with pytest.raises(NotHFError, match=r"adapters on top \(LoRA\); merge or unload them first"):
        model.merge_and_unload()
    assert not (tmp_path / "organ").exists()
    assert torch.equal(logits(lora.unload(), token_ids), before)
    assert torch.equal(logits(model.unload(), token_ids), logits(tiny_model("llama"), token_ids))


@pytest.mark.parametrize("drop", ["unload", "merge_and_unload"])
def test_prompt_learning_passes_calls_on_to_the_model(drop, token_ids):
    """What docs/compatibility/peft-trl.md warns of, and the way out."""
    model = transplanted(("a", tiny_organ(1), {}))
    before = logits(model, token_ids)
    wrapped = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert wrapped.get_base_model() is model and torch.equal(logits(model, token_ids), before)
    getattr(wrapped, drop)()
    assert not isinstance(model, TransplantedForCausalLM)
