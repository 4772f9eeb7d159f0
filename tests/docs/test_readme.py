"""Every Python block of the README runs as it stands, on tiny stand-ins for the models it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import GPT2Config, GPT2LMHeadModel

from not_hf import DonorModel
from testing import ROOT
from testing.models import VOCAB, tiny_tokenizer

README = ROOT / "README.md"


@pytest.fixture
def stand_ins(hub, tmp_path, monkeypatch) -> None:
    """`me/gpt2` and `me/gpt2-medium`: 12 layers each, of different width; a second organ; a text."""
    monkeypatch.chdir(tmp_path)
    Path("kjv.txt").write_text("w3 w4 w5 w6 w7\n" * 400)
    for name, width in (("gpt2", 32), ("gpt2-medium", 64)):
        config = GPT2Config(n_embd=width, n_head=4, n_layer=12, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
        GPT2LMHeadModel(config).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
        HfApi().upload_folder(repo_id=HfApi().create_repo(f"me/{name}").repo_id, folder_path=name)
    DonorModel.from_base("me/gpt2", (7, 9)).push_to_hub("me/gpt2-law")
    layers = list(GPT2LMHeadModel.from_pretrained("gpt2").transformer.h)[4:7]
    torch.save([layer.state_dict() for layer in layers], "donor_layers.pt")
    HfApi().create_repo("me/layers")
    HfApi().upload_file(repo_id="me/layers", path_in_repo="donor_layers.pt", path_or_fileobj="donor_layers.pt")


def test_every_python_block_runs(stand_ins, capsys):
    text = README.read_text(encoding="utf-8")
    for ours, theirs in {
        "openai-community/": "me/",
        "[[464, 3726]]": "[[46, 37]]",
        "max_steps=500, save_steps=250": "max_steps=4, save_steps=2, use_cpu=True",
        "num_train_epochs=3": "num_train_epochs=0.1, use_cpu=True",
        "block_length=256": "block_length=16",
        "In the beginning God created": "w5 w6 w7",
    }.items():
        assert ours in text
        text = text.replace(ours, theirs)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert "me/gpt2-kjv" in capsys.readouterr().out
    assert scope["both"].active_donors == ["gpt2-kjv", "law"]
    assert Path("gpt2-imported/model.safetensors").is_file()
    assert Path("gpt2-kjv-merged/config.json").is_file()
    assert Path("runs/kjv/checkpoint-4/model.safetensors").stat().st_size < 200_000


def test_the_commands_it_names_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
