"""Recipients whose weights are quantized: organs join in their own dtype, and merging is refused or dequantizes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from architectures import VOCAB, tiny_model
from organs import organ, same
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
)

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM, UnsupportedArchitectureError

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # blocks of quantized weights need some width
WAYS = {
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
    "quanto int4": lambda: QuantoConfig(weights="int4"),
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
}


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    tiny_model("llama", **WIDE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def donor(base) -> DonorModel:
    return organ(base, 1)


@pytest.mark.parametrize("way", WAYS)
def test_an_organ_joins_a_quantized_recipient(way, base, donor, token_ids, tmp_path, caplog):
    config = WAYS[way]
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config())
    before = logits(plain, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, donor, quantization_config=config())
    assert model._surgery.is_quantized and "cannot be merged" not in caplog.text
    after = logits(model, token_ids)
    assert not torch.equal(after, before)
    assert model.get_donor_status()["default"].dtypes == ["float32"]  # its own, unquantized
    with model.disable_donors():
        assert torch.equal(logits(model, token_ids), before)
    options = {"attention_mask": torch.ones_like(token_ids), "do_sample": False, "max_new_tokens": 4}
    assert model.generate(token_ids, **options).shape == (2, 13)
    model.set_donor_scale("default", 0.5)
    assert not torch.equal(logits(model, token_ids), after)
    model.set_donor_scale("default", 1)

    model.save_pretrained(tmp_path)
    assert same(DonorModel.from_pretrained(tmp_path), donor)
    live = TransplantedForCausalLM.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(live, token_ids), after)
    unloaded = live.unload()
    assert type(unloaded) is LlamaForCausalLM and torch.equal(logits(unloaded, token_ids), before)
    with pytest.raises(UnsupportedArchitectureError, match="is quantized"):
        DonorModel.from_base(unloaded, (0, 1))


@pytest.mark.parametrize("way", [way for way in WAYS if "bitsandbytes" not in way])
def test_what_transformers_cannot_dequantize_is_not_merged(way, base, donor, token_ids):
    model = TransplantedForCausalLM.from_pretrained(base, donor, quantization_config=WAYS[way]())
    before = logits(model, token_ids)
    for dequantize in (False, True):
        with pytest.raises(NotHFError, match="which transformers cannot undo; load it without quantization"):
            model.merge_and_unload(dequantize=dequantize)
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize("way", [way for way in WAYS if "bitsandbytes" in way])
def test_merging_dequantizes_only_when_asked_to(way, base, donor, token_ids, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base, donor, quantization_config=WAYS[way]())
    with pytest.raises(NotHFError, match=r"merge_and_unload\(dequantize=True\) dequantizes it first"):
        model.merge_and_unload()
    assert model.active_donors == ["default"] and model._surgery.is_quantized
    native = model.merge_and_unload(dequantize=True)
    assert type(native) is LlamaForCausalLM and all(p.requires_grad for p in native.parameters())
    dequantized = AutoModelForCausalLM.from_pretrained(base, quantization_config=WAYS[way]()).dequantize()
    expected = TransplantedForCausalLM.from_pretrained(dequantized, donor)
    assert torch.equal(logits(native, token_ids), logits(expected, token_ids))
    native.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), logits(native, token_ids))


def test_four_bits_that_ran_on_a_cpu_are_not_merged(base, donor, token_ids):
    """bitsandbytes 0.50 packs them for the CPU's kernels, where it has those, and dequantizes them into noise."""
    config = WAYS["bitsandbytes 4 bit"]()
    model = TransplantedForCausalLM.from_pretrained(base, donor, quantization_config=config)
    before = logits(model, token_ids)
    if not any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        pytest.skip("this CPU has no kernels to pack weights for")
    with pytest.raises(NotHFError, match="load it anew and merge before it runs"):
        model.merge_and_unload(dequantize=True)
    assert torch.equal(logits(model, token_ids), before)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory) -> Path:
    """A tiny llama in a GGUF file, some of its weights in blocks of eight bits."""
    folder = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama", **WIDE)
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        name = names.get_name(name, try_suffixes=(".weight",))
        if "ffn" in name and "norm" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize("given", [{}, {"quantization_config": GgufConfig(dequantize=True)}])
def test_an_organ_joins_a_recipient_out_of_a_gguf_file(given, gguf_folder, donor, token_ids, tmp_path):
    options = {"gguf_file": "tiny.gguf", **given}
    before = logits(AutoModelForCausalLM.from_pretrained(gguf_folder, **options), token_ids)
    model = TransplantedForCausalLM.from_pretrained(gguf_folder, donor, **options)
    after = logits(model, token_ids)
    with model.disable_donors():
        assert torch.equal(logits(model, token_ids), before)
    assert not torch.equal(after, before)
    native = model.merge_and_unload()
    native.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), after)
