"""Recipients in 4 or 8 bits: the organ stays plain beside them, and merging makes them plain only when told to."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import pytest
import torch
from torch.utils.cpp_extension import get_default_build_root
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig
from transformers import logging as transformers_logging

from not_hf import IncompatibleDonorError, NotHFError, TransplantedForCausalLM
from not_hf.architecture.quantization import is_quantized
from testing import EXAMPLES, load_script
from testing.donors import organ
from testing.models import tiny_model


# torchao and bitsandbytes are not in the dev extra: both print on stderr when transformers imports them, which it does
# wherever they are installed, and tests of the command line want silence there.
def torchao():
    pytest.importorskip("torchao", minversion="0.18")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto(weights: str):
    return QuantoConfig(weights=weights)


def bitsandbytes(**bits):
    pytest.importorskip("bitsandbytes", minversion="0.50")
    return BitsAndBytesConfig(**bits)


# quanto compiles an extension when 4 bits are first used: once for this file, not in several workers at a time
pytestmark = pytest.mark.xdist_group("quantization")

# how to make the config; whether its plain weights compute what its packed ones do
QUANTIZERS = {
    "torchao int8": (torchao, 1e-4),
    "quanto int8": (lambda: quanto("int8"), 1e-4),
    "quanto int4": (lambda: quanto("int4"), 1e-4),
    "bitsandbytes int8": (lambda: bitsandbytes(load_in_8bit=True), 1.0),  # it rounds activations to 8 bits too
    "bitsandbytes nf4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), None),
}
COMPILED = "quanto int4"  # the extension is compiled for it


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Wide enough for bitsandbytes' kernels."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once() -> None:
    """quanto compiles two short files on first use, each with all of torch's headers, and again in the next venv.

    Here they are one file, which is compiled once on a machine, for these versions.
    """
    from optimum.quanto.library.extensions import get_extension  # imports all that it can quantize, a second

    versions = "-".join(version(package) for package in ("torch", "optimum-quanto"))
    folder = Path(get_default_build_root(), f"quanto-{versions}-{sys.implementation.cache_tag}")
    folder.mkdir(parents=True, exist_ok=True)
    extension = get_extension("quanto_cpp")
    if (library := folder / "quanto_cpp.so").exists():
        extension._lib = load_script(library)
        return
    (folder / "both.cpp").write_text("".join(f'#include "{source}"\n' for source in extension.sources))
    extension.build_directory, extension.sources = str(folder), [str(folder / "both.cpp")]
    extension.extra_cflags = ["-O0"]


MARKS = {COMPILED: [pytest.mark.slow, pytest.mark.exhaustive]}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, ())) for name in QUANTIZERS])
def quantizer(request):
    return request.param


@pytest.fixture(autouse=True)
def _quiet():
    yield
    transformers_logging.set_verbosity_warning()  # torchao's import raises it


def load(base, quantizer):
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=QUANTIZERS[quantizer][0]())


@torch.no_grad()
def test_life_of_an_organ(quantizer, base, token_ids, tmp_path, caplog):
    native = load(base, quantizer)
    assert is_quantized(native)
    bare = native(token_ids).logits
    model = TransplantedForCausalLM.from_pretrained(native, organ(base, 1))
    assert not any("cannot be merged" in record.message for record in caplog.records)
    for layer in model.model.layers[3:5]:
        assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
        assert all(type(m) is torch.nn.Linear for m in layer.modules() if isinstance(m, torch.nn.Linear))
    expected = model(token_ids).logits
    assert not torch.equal(expected, bare) and model.generate(token_ids, max_new_tokens=3).shape == (2, 12)
    with model.disable_donors():
        assert torch.equal(model(token_ids).logits, bare)

    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForCausalLM.from_pretrained(
        base, tmp_path / "organ", quantization_config=QUANTIZERS[quantizer][0]()
    )
    assert torch.equal(again(token_ids).logits, expected)
    plain = TransplantedForCausalLM.from_pretrained(base, tmp_path / "organ")
    ours, theirs = model.model.layers[3].state_dict(), plain.model.layers[3].state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model.unload() is native and torch.equal(native(token_ids).logits, bare)


@torch.no_grad()
def test_merging_is_asked_for(quantizer, base, token_ids, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(load(base, quantizer), organ(base, 1))
    with pytest.raises(NotHFError, match=r"recipient is quantized .*merge_and_unload\(dequantize=True\)"):
        model.merge_and_unload()
    assert is_quantized(model) and model.active_donors == ["default"]
    tolerance = QUANTIZERS[quantizer][1]
    expected = None if tolerance is None else model(token_ids).logits
    merged = model.merge_and_unload(dequantize=True)
    assert not is_quantized(merged) and type(merged).__name__ == "LlamaForCausalLM"
    assert getattr(merged.config, "quantization_config", None) is None
    assert all(parameter.requires_grad for parameter in merged.parameters())
    logits = merged(token_ids).logits
    if expected is not None:
        assert torch.allclose(logits, expected, atol=tolerance)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(token_ids).logits, logits)


@torch.no_grad()
def test_what_cannot_be_merged_stays_packed(quantizer, base, token_ids, monkeypatch):
    model = TransplantedForCausalLM.from_pretrained(load(base, quantizer), organ(base, 1))
    expected, kinds = model(token_ids).logits, [type(module) for module in model.modules()]
    if not any(hasattr(getattr(p, "quant_state", None), "packing_format_for_cpu") for p in model.parameters()):
        model.model.layers[3].self_attn.scaling *= 2  # what a native model would not have
        expected = model(token_ids).logits
        with pytest.raises(IncompatibleDonorError, match="cannot hold these layers"):
            model.merge_and_unload(dequantize=True)
    else:
        with pytest.raises(NotHFError, match="cannot dequantize 4-bit weights that have run on CPU"):
            model.merge_and_unload(dequantize=True)
    assert [type(module) for module in model.modules()] == kinds and is_quantized(model)
    assert model.config.quantization_config is not None
    assert torch.equal(model(token_ids).logits, expected)


@pytest.mark.slow
@torch.no_grad()
def test_gguf(tmp_path, token_ids):
    """transformers dequantizes the file while it loads, or leaves it packed where it has kernels."""
    model = tiny_model("llama", head_dim=8)
    model.save_pretrained(tmp_path / "plain")
    config, folder = model.config, tmp_path / "gguf"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        data = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 and data.shape[-1] % 32 == 0 else None
        if kind is not None:
            writer.add_tensor(names.get_name(key, (".weight",)), gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(key, (".weight",)), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    organ(str(tmp_path / "plain"), 1).save_pretrained(tmp_path / "organ")

    native = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
    bare = native(token_ids).logits
    model = TransplantedForCausalLM.from_pretrained(folder, tmp_path / "organ", gguf_file="tiny.gguf")
    expected = model(token_ids).logits
    assert not torch.equal(expected, bare)
    with model.disable_donors():
        assert torch.equal(model(token_ids).logits, bare)
    merged = model.merge_and_unload(dequantize=is_quantized(model))
    assert torch.allclose(merged(token_ids).logits, expected, atol=1e-4)
    expected = merged(token_ids).logits
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(token_ids).logits, expected)


def test_the_example(base_folder, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("quantized_example", EXAMPLES / "quantized.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = base_folder("llama")
    organ(str(folder), 1).save_pretrained(tmp_path / "organ")
    example.main(["--base", str(folder), "--donor", str(tmp_path / "organ"), "--merged", str(tmp_path / "merged")])
    printed = capsys.readouterr().out
    assert "disabled: the quantized base, bit for bit: True" in printed and "merged: " in printed
    assert "not_hf" not in (tmp_path / "merged" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_hidden_layers == 6


@torch.no_grad()
def test_scale_and_swap_beside_packed_weights(quantizer, base, token_ids):
    model = TransplantedForCausalLM.from_pretrained(load(base, quantizer), organ(base, 1))
    full = model(token_ids).logits
    model.set_donor_scale("default", 0)
    with model.disable_donors():
        bare = model(token_ids).logits
    assert torch.allclose(model(token_ids).logits, bare, atol=1e-5)
    model.set_donor_scale("default", 1)
    model.hotswap_donor("default", organ(base, 2))
    assert not torch.equal(model(token_ids).logits, full)
    model.hotswap_donor("default", organ(base, 1))
    assert torch.equal(model(token_ids).logits, full)
