"""Organs saved as LoRA adapters, and adapters made organs."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel

from local_hub import DEFAULT_TOKEN
from not_hf import (
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
    from_lora,
    to_lora,
)
from testing.donors import moved, organ, same
from testing.models import logits, tiny_model

FULL = 48  # the rank of the widest matrix of the tiny models


def with_replaced(model_type: str, span: tuple[int, int] = (1, 3)) -> TransplantedForCausalLM:
    donor = moved(DonorModel.from_base(tiny_model(model_type), span, mode="replace"), 1)
    return TransplantedForCausalLM.from_pretrained(tiny_model(model_type), donor, donor_name="kjv")


def adapted(model_type: str, folder) -> PreTrainedModel:
    return PeftModel.from_pretrained(tiny_model(model_type), folder)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen2", "gpt_neox", "starcoder2"])
def test_at_full_rank_the_adapter_is_the_organ(model_type, token_ids, tmp_path):
    """Norms go along; biases do where each adapted matrix has one."""
    model = with_replaced(model_type)
    if model_type == "qwen2":  # which has biases at some matrices: they cannot go along, so they stay the base's
        for ours, theirs in zip(model.model.layers, tiny_model(model_type).model.layers, strict=True):
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(ours.self_attn, name).bias.data.copy_(getattr(theirs.self_attn, name).bias.data)
    matrices = to_lora(model, "kjv", tmp_path / "lora", rank=FULL)
    assert all(matrix.error < 1e-6 for matrix in matrices)
    lora = adapted(model_type, tmp_path / "lora")
    torch.testing.assert_close(logits(lora, token_ids), logits(model, token_ids), atol=2e-5, rtol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(lora.generate(input_ids=token_ids, **options), model.generate(token_ids, **options))
    merged = lora.merge_and_unload()
    torch.testing.assert_close(logits(merged, token_ids), logits(model, token_ids), atol=2e-5, rtol=1e-4)


def test_the_error_is_what_the_product_loses(tmp_path):
    model = with_replaced("llama")
    before = copy.deepcopy(model.state_dict())
    errors = [to_lora(model, "kjv", tmp_path / str(rank), rank=rank) for rank in (1, 8, FULL)]
    assert same(before, model)
    for low, middle, full in zip(*errors, strict=True):
        assert low.name == middle.name == full.name and 1 > low.error > middle.error > full.error
    name = "model.layers.2.mlp.down_proj"
    change = model.get_submodule(name).weight - tiny_model("llama").get_submodule(name).weight
    merged = adapted("llama", tmp_path / "8").merge_and_unload()
    held = merged.get_submodule(name).weight - tiny_model("llama").get_submodule(name).weight
    (found,) = [matrix.error for matrix in errors[1] if matrix.name == name]
    change, held = change.detach(), held.detach()
    assert float((change - held).norm() / change.norm()) == pytest.approx(found, abs=1e-4)
    values = torch.linalg.svdvals(change)
    assert found == pytest.approx(float(values[8:].norm() / values.norm()), abs=1e-4)


def test_where_only_a_bias_has_changed_the_product_loses_nothing(tmp_path):
    donor = DonorModel.from_base(tiny_model("gpt2"), (1, 3), mode="replace")
    donor.stack.layers[0].attn.c_proj.bias.data += 0.1
    model = TransplantedForCausalLM.from_pretrained(tiny_model("gpt2"), donor, donor_name="kjv")
    assert {matrix.error for matrix in to_lora(model, "kjv", tmp_path / "lora", rank=2)} == {0.0}
    assert "nan" not in (tmp_path / "lora/README.md").read_text()


def test_files_are_those_that_servers_read(tmp_path, caplog):
    """One rank for all, no `modules_to_save` if norms are left out, which is said; a card that keeps edits."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    donor = moved(DonorModel.from_base(tmp_path / "base", (1, 3), mode="replace"), 1)
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "base", donor, donor_name="kjv")
    caplog.set_level(logging.WARNING)
    to_lora(model, "kjv", tmp_path / "lora", rank=4, with_norms=False)
    assert "leaves out changes of norms and biases: model.layers.1.input_layernorm" in caplog.text
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config["rank_pattern"] and not config["modules_to_save"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base") and config["task_type"] == "CAUSAL_LM"
    assert len(config["target_modules"]) == 14
    readme = tmp_path / "lora" / "README.md"
    card = ModelCard.load(readme)
    assert card.data.library_name == "peft" and "`model.layers.1.mlp.up_proj`" in card.text
    assert card.data.base_model is None and str(tmp_path) not in readme.read_text()  # a path is nobody else's
    readme.write_text(f"{card}\nWritten by hand.\n")
    to_lora(model, "kjv", tmp_path / "lora", rank=2, with_norms=False)
    assert "Written by hand." in readme.read_text() and "Rank: 2" in readme.read_text()
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.slow
def test_what_lora_cannot_be_is_refused(tmp_path):
    inserted = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), organ(tiny_model("llama"), 1))
    with pytest.raises(IncompatibleDonorError, match="is inserted, and LoRA adds no layers"):
        to_lora(inserted, "default", tmp_path / "lora")
    model = with_replaced("llama")
    with pytest.raises(NotHFError, match="no organ named law; loaded organs: kjv"):
        to_lora(model, "law", tmp_path / "lora")
    with pytest.raises(NotHFError, match="rank must be a positive number, got 0"):
        to_lora(model, "kjv", tmp_path / "lora", rank=0)
    model.save_pretrained(tmp_path / "organ")
    with pytest.raises(NotHFError, match="organ holds a model; choose another folder for the adapter"):
        to_lora(model, "kjv", tmp_path / "organ")
    with pytest.raises(
        UnsupportedArchitectureError, match=r"cannot hold the change of model\.layers\.1\.mlp\.gate, a Mixtral"
    ):
        to_lora(with_replaced("mixtral"), "kjv", tmp_path / "lora")
    untouched = DonorModel.from_base(tiny_model("llama"), (1, 3), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), untouched)
    with pytest.raises(NotHFError, match="has the recipient's own matrices; there is nothing to save"):
        to_lora(model, "default", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


VARIANTS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["v_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 3},
        "alpha_pattern": {"up_proj": 5},
    },
    "norms": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["layers.1.input_layernorm", "layers.2.input_layernorm"],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
def test_an_adapter_becomes_an_organ(variant, live, base_folder, token_ids, tmp_path):
    config = LoraConfig(layers_to_transform=[1, 2], init_lora_weights=False, **VARIANTS[variant])
    lora = get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                parameter.mul_(1.3)
    lora.save_pretrained(tmp_path / "lora")
    expected = logits(lora.eval(), token_ids)
    donor = from_lora(tiny_model("llama") if live else base_folder("llama"), tmp_path / "lora")
    assert donor.config.layers == [1, 3] and donor.config.mode == "replace"
    donor.save_pretrained(tmp_path / "organ")
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path / "organ")
    torch.testing.assert_close(logits(model, token_ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("bias", "span"), [("lora_only", [1, 3]), ("all", [0, 4])])
def test_an_adapter_with_biases_becomes_an_organ(bias, span, token_ids, tmp_path):
    """PEFT saves those of adapted modules as `q_proj.base_layer.bias`, and with "all" those of every layer."""
    options = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2], "init_lora_weights": False}
    lora = get_peft_model(tiny_model("qwen2"), LoraConfig(bias=bias, **options))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(0.3)
    lora.save_pretrained(tmp_path)
    donor = from_lora(tiny_model("qwen2"), tmp_path)
    assert donor.config.layers == span
    model = TransplantedForCausalLM.from_pretrained(tiny_model("qwen2"), donor)
    torch.testing.assert_close(logits(model, token_ids), logits(lora.eval(), token_ids), atol=1e-5, rtol=1e-4)


def test_there_and_back(base_folder, token_ids, tmp_path):
    model = with_replaced("llama")
    to_lora(model, "kjv", tmp_path / "lora", rank=FULL)
    donor = from_lora(base_folder("llama"), tmp_path / "lora")
    again = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    torch.testing.assert_close(logits(again, token_ids), logits(model, token_ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, r"adapts layers \[0, 2\], which do not stand"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts modules outside of the layers, which no organ holds"),
    ],
)
def test_an_adapter_that_is_no_block_of_layers_is_refused(options, message, base_folder, tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match=message):
        from_lora(base_folder("llama"), tmp_path)


def test_other_adapters_are_refused(base_folder, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match="is an adapter of type PREFIX_TUNING; only LoRA can be made an organ"):
        from_lora(base_folder("llama"), tmp_path)


def test_a_folder_without_an_adapter_is_an_os_error(base_folder, tmp_path):
    with pytest.raises(OSError, match=r"has no adapter_config\.json$"):
        from_lora(base_folder("llama"), tmp_path)
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"has no adapter_model\.safetensors$"):
        from_lora(base_folder("llama"), tmp_path)


def test_an_activated_lora_is_refused(base_folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 2], alora_invocation_tokens=[5])
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match=r"is an activated LoRA, .*; an organ adapts all of it"):
        from_lora(base_folder("llama"), tmp_path)


def test_a_lora_of_parameters_is_refused(base_folder, tmp_path):
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(tiny_model("mixtral"), config).save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match=r"adapts parameters by name \(mlp.experts.down_proj\), .* merge it with"):
        from_lora(base_folder("mixtral"), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_an_adapter_is_fetched_as_the_base_is(base_repo, hub, tmp_path, monkeypatch):
    """With the token, into the cache and, from there, without the Hub."""
    base, live = base_repo("llama"), tiny_model("llama")
    HfApi().create_repo("me/lora", private=True)
    HfApi().create_branch("me/lora", branch="v1")
    expected = []
    for n, options in enumerate(({}, {"revision": "v1", "path_in_repo": "inner"})):
        config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 2], r=n + 1, init_lora_weights=False)
        get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / f"{n}")
        HfApi().upload_folder(repo_id="me/lora", folder_path=tmp_path / f"{n}", **options)
        expected.append(from_lora(live, tmp_path / f"{n}"))
    assert not same(*expected)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="me/lora is not a local folder"):
        from_lora(base, "me/lora")
    where = {"token": DEFAULT_TOKEN, "cache_dir": tmp_path / "elsewhere"}
    assert same(from_lora(base, "me/lora", **where), expected[0])
    inner = {"adapter_revision": "v1", "adapter_subfolder": "inner", **where}
    assert same(from_lora(live, "me/lora", **inner), expected[1])
    hub.requests.clear()
    assert same(from_lora(live, "me/lora", **inner, local_files_only=True), expected[1])
    assert not hub.requests
    with pytest.raises(OSError, match=r"me/lora has no adapter_config\.json in the cache"):
        from_lora(live, "me/lora", local_files_only=True)  # but in the other one
    with pytest.raises(TypeError, match="revision: only for a base that is read"):
        from_lora(live, tmp_path / "0", revision="v1")
    with pytest.raises(TypeError, match="unexpected arguments: rank"):
        from_lora(live, tmp_path / "0", rank=4)


def test_an_adapter_of_another_base_is_refused(base_folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])
    get_peft_model(tiny_model("llama", hidden_size=64), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit .*size mismatch"):
        from_lora(base_folder("llama"), tmp_path)


def test_a_model_without_organs_is_refused(tmp_path):
    with pytest.raises(NotHFError, match="LlamaForCausalLM has no organs; give a TransplantedForCausalLM"):
        to_lora(tiny_model("llama"), "kjv", tmp_path)
