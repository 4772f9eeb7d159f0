"""Recipients that accelerate spreads over devices or offloads: the organ goes where its neighbours run."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from transformers import AutoModelForCausalLM, pipeline

from not_hf import (
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    perplexity,
    require_isolation,
    sweep_positions,
)
from not_hf.architecture.devices import execution_device, spliced_device_map
from testing.donors import organ, same
from testing.models import tiny_tokenizer

OUTSIDE = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
ON_DISK = {**OUTSIDE, **{f"model.layers.{n}": "disk" if n in (1, 2) else "cpu" for n in range(4)}}


def load(base, **kwargs):
    return AutoModelForCausalLM.from_pretrained(base, **kwargs)


WAYS = {
    "device_map": lambda base, folder: load(base, device_map=dict(ON_DISK), offload_folder=folder),
    "dispatch_model": lambda base, folder: dispatch_model(load(base), dict(ON_DISK), offload_dir=folder),
    "cpu_offload": lambda base, folder: cpu_offload(load(base), execution_device=torch.device("cpu")),
    "disk_offload": lambda base, folder: disk_offload(load(base), folder, execution_device=torch.device("cpu")),
    "auto": lambda base, folder: load(base, device_map="auto"),
    "one device": lambda base, folder: load(base, device_map={"": "cpu"}),
}
KEEPS_A_MAP = ("device_map", "dispatch_model")


@pytest.fixture(
    params=[
        pytest.param(each, marks=pytest.mark.slow if each in ("dispatch_model", "disk_offload", "auto") else ())
        for each in WAYS
    ]
)
def way(request):
    return request.param


@pytest.mark.parametrize("mode", ["insert", pytest.param("replace", marks=pytest.mark.slow)])
@torch.no_grad()
def test_life_of_an_organ(way, mode, base_folder, token_ids, tmp_path):
    base, donor = str(base_folder("llama")), organ(str(base_folder("llama")), 1)
    native = load(base)
    bare, text = native(token_ids).logits, native.generate(token_ids, max_new_tokens=4)
    plain = TransplantedForCausalLM.from_pretrained(native, donor, position=1, mode=mode)
    spread = WAYS[way](base, str(tmp_path / "offload"))
    before = copy.copy(getattr(spread, "hf_device_map", None))

    model = TransplantedForCausalLM.from_pretrained(spread, donor, position=1, mode=mode)
    expected = plain(token_ids).logits
    assert not torch.equal(expected, bare)
    assert torch.equal(model(token_ids).logits, expected)
    assert torch.equal(model.generate(token_ids, max_new_tokens=4), plain.generate(token_ids, max_new_tokens=4))
    assert not any(parameter.is_meta for layer in model.model.layers[1:3] for parameter in layer.parameters())
    with model.disable_donors():
        assert torch.equal(model(token_ids).logits, bare)
        assert getattr(model, "hf_device_map", None) == before
    assert torch.equal(copy.deepcopy(model)(token_ids).logits, expected)
    model.save_pretrained(tmp_path / "organ")
    assert torch.equal(TransplantedForCausalLM.from_pretrained(base, tmp_path / "organ")(token_ids).logits, expected)
    assert model.unload() is spread and getattr(spread, "hf_device_map", None) == before
    assert torch.equal(spread(token_ids).logits, bare)
    assert torch.equal(spread.generate(token_ids, max_new_tokens=4), text)


@pytest.mark.parametrize("way", KEEPS_A_MAP)
def test_the_device_map_follows_and_the_hook_stands(way, base_folder, tmp_path):
    base = str(base_folder("llama"))
    spread = WAYS[way](base, str(tmp_path))
    model = TransplantedForCausalLM.from_pretrained(spread, organ(base, 1), position=1)
    places = [model.hf_device_map[f"model.layers.{n}"] for n in range(6)]
    assert places == ["cpu", "cpu", "cpu", "disk", "disk", "cpu"]
    hook = model.model.layers[1]._hf_hook
    assert isinstance(hook, AlignDevicesHook) and not hook.offload and not hook.io_same_device
    assert hook.execution_device == execution_device(model.model.layers[3]) == torch.device("cpu")
    assert hook.skip_keys == model._skip_keys_device_placement


@pytest.mark.parametrize("way", KEEPS_A_MAP)
@torch.no_grad()
def test_merging_and_saving(way, base_folder, token_ids, tmp_path):
    base = str(base_folder("llama"))
    model = TransplantedForCausalLM.from_pretrained(
        WAYS[way](base, str(tmp_path / "offload")), organ(base, 1), position=1
    )
    expected = model(token_ids).logits
    merged = model.merge_and_unload()
    assert torch.equal(merged(token_ids).logits, expected) and merged.hf_device_map["model.layers.3"] == "disk"
    with pytest.warns(UserWarning, match="offloaded modules"):
        merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged")(token_ids).logits, expected)


@pytest.mark.slow
@torch.no_grad()
def test_by_id_with_a_device_map_a_dtype_and_a_second_organ(base_repo, token_ids, tmp_path):
    base = base_repo("llama")
    organ(base, 1).save_pretrained(tmp_path / "organ")
    spread = {"device_map": dict(ON_DISK), "offload_folder": str(tmp_path / "offload")}
    plain = TransplantedForCausalLM.from_pretrained(base, tmp_path / "organ", dtype="auto")
    model = TransplantedForCausalLM.from_pretrained(base, tmp_path / "organ", dtype="auto", **spread)
    for each in (plain, model):
        each.load_donor(organ(base, 2), "second", position=2)
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)
    model.delete_donor("default")
    plain.delete_donor("default")
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)
    assert [key for key, place in model.hf_device_map.items() if place == "disk"] == [
        "model.layers.1",
        "model.layers.4",
    ]


@pytest.mark.slow
@torch.no_grad()
def test_offloaded_embeddings(base_folder, token_ids, tmp_path):
    base, text = str(base_folder("llama")), {"predictions": ["w5 w6 w7 w8 w9"] * 2, "tokenizer": tiny_tokenizer()}
    device_map = {name: "cpu" if "layers" in name else place for name, place in ON_DISK.items()}
    device_map |= {"model.embed_tokens": "disk", "model.layers.1": "disk"}
    spread = load(base, device_map=device_map, offload_folder=str(tmp_path))
    assert same(DonorModel.from_base(spread, (2, 4)), DonorModel.from_base(base, (2, 4)))
    donor, how = organ(base, 1), {"data": text["predictions"], "tokenizer": text["tokenizer"]}
    sweep, plain = (sweep_positions(each, donor, **how).rows for each in (spread, load(base)))
    assert [row["nats_per_token"] for row in sweep] == [row["nats_per_token"] for row in plain]
    model = TransplantedForCausalLM.from_pretrained(spread, donor)
    plain = TransplantedForCausalLM.from_pretrained(base, donor)
    ours, theirs = (perplexity.compute(model=each, **text) for each in (model, plain))
    assert ours["perplexities"] == theirs["perplexities"]
    prefill = model.prefill(token_ids)
    for _ in range(2):
        found = model.generate(token_ids, max_new_tokens=4, prefill=prefill)
        assert torch.equal(found, plain.generate(token_ids, max_new_tokens=4))
    spread.config.use_cache = False
    require_isolation(model)
    assert model.unload() is spread


def test_pipeline(base_folder, tmp_path):
    base = str(base_folder("llama"))
    spread = WAYS["device_map"](base, str(tmp_path))
    model = TransplantedForCausalLM.from_pretrained(spread, organ(base, 1), position=1)
    (answer,) = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())("w5 w6", max_new_tokens=3)
    assert answer["generated_text"].startswith("w5 w6")


def test_fp32_norms_in_a_half_precision_recipient(base_folder, token_ids):
    base = str(base_folder("llama"))
    native = load(base, dtype=torch.bfloat16)
    for name, module in native.named_modules():
        if name.endswith("layernorm"):
            module.float()
    model = TransplantedForCausalLM.from_pretrained(native, organ(base, 1))
    dtypes = {name: parameter.dtype for name, parameter in model.model.layers[3].named_parameters()}
    assert dtypes["input_layernorm.weight"] == torch.float32
    assert dtypes["mlp.up_proj.weight"] == torch.bfloat16


def test_weights_that_are_nowhere_are_refused(base_folder):
    base = str(base_folder("llama"))
    donor = organ(base, 1)
    config = load(base).config
    with torch.device("meta"):
        empty, hollow = AutoModelForCausalLM.from_config(config), DonorModel(donor.config)
    with pytest.raises(NotHFError, match="layers have no weights"):
        TransplantedForCausalLM.from_pretrained(empty, donor)
    with pytest.raises(NotHFError, match="donor is offloaded or has no weights"):
        TransplantedForCausalLM.from_pretrained(load(base), hollow)


def test_device_maps_of_every_grain():
    gpu = torch.device("cuda", 1)
    assert spliced_device_map({"": 0}, "model.layers", [0, gpu]) == {"": 0}
    assert spliced_device_map({"model": 0, "lm_head": "cpu"}, "model.layers", [0, gpu]) == {
        "model": 0,
        "lm_head": "cpu",
    }
    fine = {"model.layers.1.mlp": "disk", "model.layers.1.self_attn": 0, "model.layers.10": 1, "lm_head": 1}
    assert spliced_device_map(fine, "model.layers", [gpu, 1, 10]) == {
        "lm_head": 1,
        "model.layers.0": 1,
        "model.layers.1.mlp": "disk",
        "model.layers.1.self_attn": 0,
        "model.layers.2": 1,
    }
