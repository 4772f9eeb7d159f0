"""Tensors of a checkpoint, as stored and as transformers would have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from not_hf import (
    CorruptDonorError,
    DonorModel,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
)
from not_hf.hub.checkpoint import DTYPES, open_checkpoint
from not_hf.hub.headers import BITS
from testing.checkpoints import write_fp8, write_mxfp4
from testing.commands import is_one_line
from testing.cuts import WIDE, cut, is_cut, nbytes, weights
from testing.donors import same
from testing.models import tiny_model
from testing.releases import dequantizes_fp8
from testing.wrappers import WRAPPERS

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_saved_one_by_one_wherever_they_were_cut(model_type, base_folder, tmp_path):
    """As they lie on the Hub."""
    for base, name in ((base_folder(model_type), "stored"), (tiny_model(model_type), "live")):
        DonorModel.from_base(base, (1, 3)).save_pretrained(tmp_path / name)
        DonorModel.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name} again")
    names = ("stored", "live", "stored again", "live again")
    layouts = [load_file(tmp_path / name / "model.safetensors").keys() for name in names]
    assert all(layout == layouts[0] for layout in layouts)
    assert any(".experts.3." in name for name in layouts[0])


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory) -> Path:
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4"))


@pytest.mark.slow
def test_mxfp4_is_dequantized_as_transformers_does_it(mxfp4, hub, tmp_path, token_ids):
    repo = HfApi().create_repo("me/mxfp4").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=mxfp4)
    native = AutoModelForCausalLM.from_pretrained(mxfp4)
    hub.requests.clear()
    organ = DonorModel.from_base(repo, (1, 3))
    assert is_cut(organ, native, (1, 3))
    assert {parameter.dtype for parameter in organ.parameters()} == {torch.bfloat16}
    served = sum(record.bytes for record in weights(hub))
    assert served < nbytes(organ)  # it travels quantized
    organ.save_pretrained(tmp_path / "organ")
    assert "quantization" not in (tmp_path / "organ" / "config.json").read_text()
    assert is_cut(DonorModel.from_pretrained(tmp_path / "organ"), native, (1, 3))

    model = TransplantedForCausalLM.from_pretrained(repo, tmp_path / "organ")
    with torch.no_grad():
        logits = model(token_ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(token_ids).logits, logits)


@dequantizes_fp8
def test_fp8_is_dequantized_as_transformers_does_it(hub, tmp_path):
    write_fp8(tmp_path)
    repo = HfApi().create_repo("me/fp8").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    dequantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    for source in (tmp_path, repo):
        organ = DonorModel.from_base(source, (1, 3))
        assert organ.dtype == torch.bfloat16 and is_cut(organ, dequantized, (1, 3))


@dequantizes_fp8
def test_fp8_of_a_text_model_that_says_so_itself_is_dequantized(tmp_path):
    llama, llava = write_fp8(tmp_path), tmp_path / "llava"
    text = json.loads((llama / "config.json").read_text())
    AutoConfig.for_model("llava", **{**WRAPPERS["llava"][0], "text_config": text}).save_pretrained(llava)
    assert "quantization_config" in json.loads((llava / "config.json").read_text())["text_config"]
    tensors = load_file(llama / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(inside, llava / "model.safetensors", metadata={"format": "pt"})
    assert same(DonorModel.from_base(llava, (1, 3)), DonorModel.from_base(llama, (1, 3)))


def test_mixed_dtypes_take_that_of_most_values(model, tmp_path):
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    assert cut(tmp_path).dtype == torch.bfloat16


def test_what_cannot_be_dequantized_is_refused(model, tmp_path):
    config = model.config.__class__.from_dict(model.config.to_dict())
    model.save_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="is quantized; dequantize it first"):
        cut(tmp_path)


def test_a_file_that_is_replaced_while_it_is_read_does_not_mix(model, tmp_path):
    other = tiny_model("llama", seed=1, **WIDE)
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    views = open_checkpoint(tmp_path / "a")
    os.replace(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    for view in views.values():
        with pytest.raises(CorruptDonorError, match="was written to while it was read"):
            view[...]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_more_tensors_than_a_process_may_open_files(tmp_path):
    """Experts come by the thousand."""
    tensors = {f"t{n}": torch.full((2,), float(n)) for n in range(3000)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    read = {name: view[...] for name, view in open_checkpoint(tmp_path).items()}
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_every_dtype_of_safetensors_is_told_and_read(tmp_path):
    """A file may hold tensors of any, outside of the span too."""
    dtypes = [getattr(torch, name) for name in DTYPES.values()]
    tensors = {str(dtype): torch.arange(8).to(dtype) for dtype in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    views = open_checkpoint(tmp_path)
    assert {view.dtype for view in views.values()} == DTYPES.keys()
    offsets = {name: view.data_offsets for name, view in views.items()}
    bits = {name: 8 * (end - start) // 8 for name, (start, end) in offsets.items()}
    assert bits == {name: BITS[view.dtype] for name, view in views.items()}
    for name, view in views.items():
        assert view[...].dtype == tensors[name].dtype
        assert view[...].view(torch.uint8).equal(tensors[name].view(torch.uint8))


def test_tensors_that_begin_anywhere_are_read(tmp_path):
    """safetensors does not align the tensors of odd files."""
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(5.0), "c": torch.zeros(0, 4)}
    entries, data = {}, b""
    for (name, tensor), dtype in zip(tensors.items(), ("U8", "F32", "F32"), strict=True):
        raw = tensor.numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        entries[name], data = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": place}, data + raw
    header = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    views = open_checkpoint(tmp_path)
    assert all(torch.equal(views[name][...], tensor) for name, tensor in tensors.items())
    assert torch.equal(views["b"][1:3], tensors["b"][1:3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": ' + "[" * 300 + "]" * 300 + "}", "nested more than 32 deep"),
        ("[" * 100_000, "nested more than 32 deep"),
        ('{"weight_map": {"a": "b.safetensors"}, "x": 1' + "0" * 400 + "}", "an integer of"),
        ('{"weight_map": "model.safetensors"}', "must map names to files"),
        ('"weight_map"', "not a safetensors index"),
        ("{", "not a safetensors index"),
        ("\xff", "not a safetensors index"),
        (json.dumps({"weight_map": {str(n): f"../{n}.safetensors" for n in range(10_000)}}), "and 9995 more"),
    ],
    ids=["nested", "open brackets", "integer", "text", "only text", "truncated", "latin", "many outside"],
)
def test_an_index_that_is_none_is_one_line(text, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptDonorError, match=message) as raised:
        open_checkpoint(tmp_path)
    assert is_one_line(raised.value)


def test_an_index_beyond_any_models_is_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(2**26 + 1)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(CorruptDonorError, match="67,108,865 bytes; it must have at most 67,108,864"):
        open_checkpoint(tmp_path)
