"""What a merged folder must be for other loaders (vLLM, llama.cpp): a native checkpoint, to the last name."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from not_hf import TransplantedForCausalLM
from testing import EXAMPLES, load_script
from testing.donors import organ
from testing.models import tiny_tokenizer


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script(EXAMPLES / "export_gguf.py")


def contents(folder: Path) -> dict[str, tuple]:
    """Shape and dtype of every tensor in the safetensors files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                found[name] = (tuple(view.get_shape()), view.get_dtype())
    return found


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_a_merged_folder_is_a_native_checkpoint(base_folder, tmp_path, model_type, max_shard_size):
    base = str(base_folder(model_type))
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1))
    layers, merged, native = model.config.num_hidden_layers, tmp_path / "merged", tmp_path / "native"
    model.merge_and_unload().save_pretrained(merged, max_shard_size=max_shard_size)

    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    theirs = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == (theirs["model_type"], theirs["architectures"])
    assert config.keys() == theirs.keys() and "not_hf" not in json.dumps(config)
    assert AutoConfig.from_pretrained(merged).num_hidden_layers == layers
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(merged), dtype=torch.float32).save_pretrained(native)
    assert contents(merged) == contents(native)

    index = merged / "model.safetensors.index.json"
    assert index.exists() == (max_shard_size == "30KB")
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        assert names.keys() == contents(merged).keys()
    assert (merged / "generation_config.json").exists()
    assert not list(merged.glob("*.py"))


def test_the_example_merges(base_folder, example, tmp_path, monkeypatch):
    base, donor, merged = str(base_folder("llama")), tmp_path / "donor", tmp_path / "merged"
    organ(base, 1).save_pretrained(donor)
    monkeypatch.setattr(sys, "argv", ["export_gguf.py", str(donor), str(merged)])
    assert example.main() == 0
    ids = torch.tensor([[5, 6, 7]])
    expected = TransplantedForCausalLM.from_pretrained(donor)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, expected)
    assert AutoTokenizer.from_pretrained(merged)("w5 w6").input_ids == tiny_tokenizer()("w5 w6").input_ids


@pytest.fixture(scope="module")
def converted(base_folder, example, tmp_path_factory) -> tuple[Path, Path]:
    """A merged llama and its GGUF file, written by the converter in the checkout that LLAMA_CPP names."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp; its converter is not on PyPI")
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("merged")
    AutoModelForCausalLM.from_pretrained(base_folder("llama")).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    organ(str(base), 1).save_pretrained(folder / "donor")
    example.merge(str(folder / "donor"), str(base), folder)
    return folder, example.convert(folder, Path(os.environ["LLAMA_CPP"]), "f32")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Of a kind that llama.cpp knows: BPE with bytes to fall back on; as many tokens as the tiny llama has."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(90)), "▁", "a", "b"]
    bpe = models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_gguf_gives_the_merged_model_back(converted):
    folder, gguf = converted
    native = AutoModelForCausalLM.from_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    assert again.config.num_hidden_layers == native.config.num_hidden_layers
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, native(ids).logits, rtol=1e-4, atol=1e-4)


def test_llama_cpp_goes_on_with_the_same_tokens(converted, example):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python builds llama.cpp, which takes minutes")
    folder, gguf = converted
    assert example.compare(folder, gguf, "a b a", 8)
