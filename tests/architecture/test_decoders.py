"""Every architecture through every promise: what must not change is bit-identical."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from not_hf import DonorModel, TransplantedForCausalLM, UnsupportedArchitectureError
from testing.models import ARCHITECTURES, OTHERS, enable_checkpointing, logits, tiny_config, tiny_model

SPAN = (1, 3)
every = pytest.mark.parametrize("model_type", ARCHITECTURES)


def generate(model: PreTrainedModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, **kwargs)


def trained(donor: DonorModel) -> DonorModel:
    """Move every weight, so that the organ matters wherever it stands."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return donor


def with_organ(model_type: str, mode: str = "insert", position: int | None = 2) -> PreTrainedModel:
    base = tiny_model(model_type)
    return TransplantedForCausalLM.from_pretrained(
        base, trained(DonorModel.from_base(base, SPAN)), position=position, mode=mode
    )


@every
def test_replacing_layers_by_themselves_changes_nothing(model_type, token_ids):
    base = tiny_model(model_type)
    before = logits(base, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, SPAN, mode="replace"))
    assert model.active_donors == ["default"]
    assert torch.equal(logits(model, token_ids), before)


@every
def test_identity_insertion_gives_the_logits_of_the_base(model_type, token_ids):
    base = tiny_model(model_type)
    before = logits(base, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, SPAN, init="identity"))
    assert model.config.num_hidden_layers == 6
    assert torch.equal(logits(model, token_ids), before)


@every
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_disabled_deleted_and_unloaded_are_the_base(model_type, mode, token_ids):
    base = tiny_model(model_type)
    native, config, before = type(base), base.config.to_dict(), logits(base, token_ids)
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    donor = trained(DonorModel.from_base(base, SPAN))
    model = TransplantedForCausalLM.from_pretrained(base, donor, position=1, mode=mode)
    after = logits(model, token_ids)
    assert not torch.equal(after, before)
    with model.disable_donors():
        assert model.config.to_dict() == config
        assert torch.equal(logits(model, token_ids), before)
    assert torch.equal(logits(model, token_ids), after)
    model.delete_donor("default")
    assert torch.equal(logits(model, token_ids), before)
    unloaded = model.unload()
    assert type(unloaded) is native and unloaded.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in unloaded.parameters())
    assert unloaded.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in unloaded.state_dict().items())


@every
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generation_agrees_with_and_without_cache(model_type, attention, token_ids):
    model = with_organ(model_type)
    try:
        tiny_model(model_type).set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"the base itself has no {attention} attention")
    model.set_attn_implementation(attention)
    greedy = generate(model, token_ids)
    assert greedy.shape == (2, token_ids.shape[1] + 8)
    assert torch.equal(greedy, generate(model, token_ids, use_cache=False))
    assert torch.equal(
        generate(model, token_ids, num_beams=2), generate(model, token_ids, num_beams=2, use_cache=False)
    )
    if static_cache_works(model_type, token_ids):
        assert torch.equal(greedy, generate(model, token_ids, cache_implementation="static"))


def static_cache_works(model_type: str, ids: torch.Tensor) -> bool:
    """Whether the base itself computes the same scores with a static cache (gpt_neo's local attention does not)."""
    base = tiny_model(model_type)
    scores = {"output_scores": True, "return_dict_in_generate": True}
    try:
        static = generate(base, ids, cache_implementation="static", **scores).scores
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        return False
    dynamic = generate(base, ids, **scores).scores
    return torch.allclose(torch.stack(static), torch.stack(dynamic), atol=1e-4)


@every
def test_saved_organs_load_to_the_same_logits(model_type, token_ids, base_folder, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder(model_type)),
        trained(DonorModel.from_base(base_folder(model_type), SPAN)),
        position=3,
    )
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_config.json"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, TransplantedForCausalLM)
    assert again.donor_config["default"].position == 3
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_organ_and_nothing_else(model_type, checkpointing, token_ids):
    base = tiny_model(model_type)
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, SPAN), is_trainable=True)
    if checkpointing:
        enable_checkpointing(model)
    model.train()
    for module in model.modules():  # so that both runs see the same network
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(token_ids, labels=token_ids, use_cache=False).loss.backward()
    organ = {id(p) for layer in model._surgery.organs["default"].layers for p in layer.parameters()}
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == {id(p) for p in model.parameters() if p.requires_grad} == organ
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


@every
def test_cut_from_a_sharded_folder_is_the_cut_from_the_live_model(model_type, base_folder):
    folder = base_folder(model_type)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    cold = DonorModel.from_base(folder, SPAN)
    live = DonorModel.from_base(AutoModelForCausalLM.from_pretrained(folder), SPAN)
    assert cold.state_dict().keys() == live.state_dict().keys()
    assert all(torch.equal(tensor, live.state_dict()[name]) for name, tensor in cold.state_dict().items())


@every
def test_an_organ_alone_continues_the_hidden_states_of_the_base(model_type, token_ids):
    base = tiny_model(model_type)
    mask = torch.ones_like(token_ids)
    mask[0, :3] = 0  # left padding
    donor = DonorModel.from_base(base, SPAN)
    with torch.no_grad():
        hidden = base(token_ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        out = donor(inputs_embeds=hidden[SPAN[0]], attention_mask=mask).last_hidden_state
    assert torch.equal(out[mask.bool()], hidden[SPAN[1]][mask.bool()])


@pytest.fixture(scope="module")
def without_not_hf(tmp_path_factory, token_ids):
    """Logits of every merged model, computed by one process that cannot import not_hf."""
    root = tmp_path_factory.mktemp("merged")
    expected = {}
    for model_type in ARCHITECTURES:
        for mode in ("insert", "replace"):
            model = with_organ(model_type, mode, position=1)
            expected[model_type, mode] = logits(model, token_ids)
            native = model.merge_and_unload()
            assert torch.equal(logits(native, token_ids), expected[model_type, mode])
            native.save_pretrained(root / f"{model_type}-{mode}")
    torch.save(token_ids, root / "ids.pt")
    script = """
        import sys, torch
        sys.modules["not_hf"] = None  # importing it raises
        from pathlib import Path
        from transformers import AutoModelForCausalLM
        torch.set_num_threads(1)
        root = Path(sys.argv[1])
        ids = torch.load(root / "ids.pt")
        found = {}
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], (folder, info)
            with torch.no_grad():
                found[folder.name] = model(ids).logits
        torch.save(found, root / "found.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(root)], check=True)
    return expected, torch.load(root / "found.pt")


@every
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_merged_models_load_without_not_hf(model_type, mode, without_not_hf):
    expected, found = without_not_hf
    assert torch.equal(found[f"{model_type}-{mode}"], expected[model_type, mode])


@pytest.mark.parametrize(("model_type", "reason"), [("mamba", "recurrent state"), ("t5", "encoder-decoder")])
def test_what_cannot_be_cut_is_refused_with_a_reason(model_type, reason, tmp_path):
    model = AutoModel.from_config(tiny_config(model_type))
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DonorModel.from_base(model, SPAN)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DonorModel.from_base(tmp_path, SPAN)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_keep_the_same_promises(model_type, token_ids, tmp_path):
    base = tiny_model(model_type)
    before = logits(base, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, SPAN, mode="replace"))
    assert torch.equal(logits(model, token_ids), before)
    base = model.unload()
    donor = trained(DonorModel.from_base(base, SPAN))
    model = TransplantedForCausalLM.from_pretrained(base, donor, position=SPAN[0], mode="replace")
    changed = logits(model, token_ids)
    assert not torch.equal(changed, before)
    assert torch.equal(generate(model, token_ids), generate(model, token_ids, use_cache=False))
    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForCausalLM.from_pretrained(tiny_model(model_type), tmp_path / "organ")
    assert torch.allclose(logits(again, token_ids), changed, atol=1e-6)
    native = model.merge_and_unload()
    native.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(reloaded, token_ids), changed, atol=1e-6)
