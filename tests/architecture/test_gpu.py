"""Organs on a GPU compute what they compute on the CPU, wherever recipient and donor were before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from not_hf import (
    DonorModel,
    TransplantedForCausalLM,
    average_donors,
    from_lora,
    import_checkpoint,
    perplexity,
    to_lora,
)
from testing.donors import SPAN, organ, same, tiny_organ
from testing.gpu import DEVICE, close, needs_gpu, on_gpu, require_on_gpu, scores
from testing.models import TOKEN_IDS, tiny_model, tiny_tokenizer

pytestmark = needs_gpu
TYPES = ["llama", "gpt2", "gemma2", "mixtral"]
PLACES = {each: {"mode": each} for each in ("insert", "replace")}
PLACES["outputs"] = {"mode": "replace", "modules": "outputs"}
TEXT: dict[str, Any] = {"predictions": [" ".join(f"w{n}" for n in range(3, 40))], "tokenizer": tiny_tokenizer()}


def cpu(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("init", ["copy", "identity"])
@pytest.mark.parametrize("model_type", TYPES)
def test_cutting(model_type, init, tmp_path):
    expected = DonorModel.from_base(tiny_model(model_type), SPAN, init=init)
    donor = DonorModel.from_base(on_gpu(model_type), SPAN, init=init)
    require_on_gpu(donor)
    assert same(cpu(donor), expected)
    hidden = torch.randn(2, 5, 32)  # (batch, seq, hidden)
    with torch.no_grad():
        outputs = [each(inputs_embeds=hidden.to(each.device)).last_hidden_state for each in (donor, expected)]
    close(*outputs)
    donor.save_pretrained(tmp_path)
    assert same(DonorModel.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize("way", ["a donor", "a donor on the GPU", "a folder", "a parked one", "moved afterwards"])
@pytest.mark.parametrize("mode", PLACES)
@pytest.mark.parametrize("model_type", TYPES)
def test_transplanting(model_type, mode, way, tmp_path):
    donor, native = tiny_organ(1, model_type, **PLACES[mode]), scores(tiny_model(model_type))
    expected = scores(TransplantedForCausalLM.from_pretrained(tiny_model(model_type), donor))
    source: Any = copy.deepcopy(donor).to(DEVICE) if way == "a donor on the GPU" else donor
    if way == "a folder":
        donor.save_pretrained(source := tmp_path / "donor")
    base = tiny_model(model_type) if way == "moved afterwards" else on_gpu(model_type)
    model = TransplantedForCausalLM.from_pretrained(base, source)
    if way in ("a parked one", "moved afterwards"):
        model.set_donor([])
        close(scores(model.cpu()), native)
        model.to(DEVICE).set_donor("default")
    require_on_gpu(model)
    close(scores(model), expected)
    with model.disable_donors():
        close(scores(model), native)
    model.save_pretrained(tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), donor)


def life(model_type: str, mode: str, device: str, folder: Any) -> list[torch.Tensor]:
    """Logits after each of an organ's changes; donors are on the CPU."""
    base = tiny_model(model_type).to(device)
    first, second, third = (
        tiny_organ(seed, model_type, span, **PLACES[mode]) for seed, span in ((1, SPAN), (2, SPAN), (3, (0, 1)))
    )
    model = TransplantedForCausalLM.from_pretrained(base, first, donor_name="a")
    found = []
    for change in (
        lambda: model.load_donor(third, "b"),
        lambda: model.set_donor_scale("a", 0.5) if (model_type, mode) != ("gemma2", "insert") else None,
        lambda: model.save_pretrained(folder / "both"),
        lambda: model.hotswap_donor("a", second),
        lambda: model.load_donor(first, "c", is_trainable=True) if mode == "insert" else None,
        lambda: model.set_donor("a"),
        lambda: model.delete_donor("b"),
    ):
        change()
        found.append(scores(model))
    again = TransplantedForCausalLM.from_pretrained(tiny_model(model_type).to(device), folder / "both")
    assert torch.equal(scores(again), found[2])
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    found += [scores(merged), scores(AutoModelForCausalLM.from_pretrained(folder / "merged"))]
    return [*found, scores(model.unload())]


@pytest.mark.parametrize("mode", PLACES)
@pytest.mark.parametrize("model_type", TYPES)
def test_life_of_two_organs(model_type, mode, tmp_path):
    for ours, theirs in zip(
        life(model_type, mode, DEVICE, tmp_path / "gpu"), life(model_type, mode, "cpu", tmp_path / "cpu"), strict=True
    ):
        close(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", "slerp", "ties", "magnitude_prune"])
def test_averaging_donors_of_different_devices(kind):
    base, options = tiny_model("llama"), {} if kind in ("linear", "slerp") else {"density": 0.5}
    donors = [tiny_organ(seed, mode="replace") for seed in (1, 2)]
    expected = average_donors(donors, combination_type=kind, base=base, **options)
    here, there = donors[0], copy.deepcopy(donors[1]).to(DEVICE)
    for pair in ([here, there], [there, here]):
        found = average_donors(pair, combination_type=kind, base=base.to(DEVICE), **options)
        assert found.device == pair[0].device
        for name, tensor in found.state_dict().items():
            close(tensor, expected.state_dict()[name])
    model = TransplantedForCausalLM.from_pretrained(base, here, donor_name="a")
    model.set_donor([])
    model.load_donor(there, "b")
    model.add_weighted_donor(["a", "b"], [1.0, 1.0], "c", combination_type=kind, **options)
    model.set_donor("c")
    close(scores(model), scores(TransplantedForCausalLM.from_pretrained(tiny_model("llama"), expected)))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_deltas_and_adapters(model_type, base_folder, tmp_path):
    base = str(base_folder(model_type))
    donor = organ(base, 1, mode="replace").to(DEVICE)
    donor.save_pretrained(tmp_path / "delta", delta="bfloat16")
    for name, tensor in DonorModel.from_pretrained(tmp_path / "delta").state_dict().items():
        torch.testing.assert_close(tensor, donor.state_dict()[name].cpu(), atol=1e-3, rtol=0.0)
    model = TransplantedForCausalLM.from_pretrained(on_gpu(model_type), donor, donor_name="a")
    assert all(matrix.error < 1e-5 for matrix in to_lora(model, "a", tmp_path / "lora", rank=48))
    back = from_lora(on_gpu(model_type), tmp_path / "lora")
    close(scores(TransplantedForCausalLM.from_pretrained(on_gpu(model_type), back)), scores(model))


def test_importing_layers_saved_on_the_gpu(tmp_path):
    layers = on_gpu("gpt2").transformer.h[slice(*SPAN)]
    torch.save([layer.state_dict() for layer in layers], tmp_path / "donor_layers.pt")
    donor = import_checkpoint(tmp_path, on_gpu("gpt2"), SPAN)
    assert same(cpu(donor), DonorModel.from_base(tiny_model("gpt2"), SPAN))


@pytest.mark.parametrize("model_type", TYPES)
def test_generating_from_a_prefill(model_type):
    low, high = (tiny_organ(n, model_type, span, mode="replace") for n, span in enumerate(((2, 4), (3, 4))))
    model = TransplantedForCausalLM.from_pretrained(on_gpu(model_type), low, donor_name="low")
    model.set_donor([])
    model.load_donor(high, "high")
    ids, mask = TOKEN_IDS.to(DEVICE), torch.ones_like(TOKEN_IDS, device=DEVICE)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    prefill = model.prefill(ids, mask)
    for names in ("low", "high", []):
        model.set_donor(names)
        assert torch.equal(model.generate(**inputs, prefill=prefill), model.generate(**inputs))


@pytest.mark.parametrize("offloaded", ["model.embed_tokens", "model.layers.1", "model.layers.3"])
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_spread_over_gpu_and_cpu(mode, offloaded, base_folder, tmp_path):
    base = str(base_folder("llama"))
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    device_map: dict[str, Any] = dict.fromkeys([*names, *(f"model.layers.{n}" for n in range(4))], DEVICE)
    donor = organ(base, 1, mode=mode)
    expected = TransplantedForCausalLM.from_pretrained(base, donor)
    spread = AutoModelForCausalLM.from_pretrained(base, device_map=device_map | {offloaded: "cpu"})
    model = TransplantedForCausalLM.from_pretrained(spread, donor, donor_name="a")
    with torch.no_grad():
        close(model(TOKEN_IDS).logits, scores(expected))
    options = {"max_new_tokens": 4, "do_sample": False}
    for ids in (TOKEN_IDS, TOKEN_IDS.to(DEVICE)):
        for prefill in (None, model.prefill(ids)):
            found = model.generate(ids, prefill=prefill, **options)
            assert torch.equal(found.cpu(), expected.generate(TOKEN_IDS, **options))
    assert perplexity.compute(model=model, **TEXT)["perplexity"] == pytest.approx(
        perplexity.compute(model=expected, **TEXT)["perplexity"], rel=1e-4
    )
    model.save_pretrained(tmp_path)
    assert same(DonorModel.from_pretrained(tmp_path), donor)
    with torch.no_grad():
        close(model.merge_and_unload()(TOKEN_IDS).logits, scores(expected))


def test_pipelines(base_folder, tmp_path):
    base = str(base_folder("llama"))
    organ(base, 1).save_pretrained(tmp_path)
    model = TransplantedForCausalLM.from_pretrained(base, tmp_path)
    answers = []
    for source in (model, str(tmp_path)):
        pipe = pipeline("text-generation", source, tokenizer=tiny_tokenizer(), device=torch.device(DEVICE).index)
        answers.append(pipe("w5 w6", max_new_tokens=3, do_sample=False))
        require_on_gpu(pipe.model)
    assert answers[0] == answers[1]
