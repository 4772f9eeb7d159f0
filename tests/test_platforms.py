"""Windows, where nothing was run: what it lacks is hidden, once other packages are imported, and is not missed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from not_hf import DonorModel
from not_hf.hub import checkpoint, folder_lock
from not_hf.hub.checkpoint import open_checkpoint
from testing.donors import holds, organ, same
from testing.processes import run_python

HIDDEN = """
import os, sys
import accelerate, datasets, evaluate, matplotlib.pyplot, transformers, typer.testing
from transformers import LlamaForCausalLM, Trainer
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "getuid", "mkfifo", "pread", "preadv", "pwrite", "register_at_fork", "sched_getaffinity"):
    delattr(os, name)
"""
LIFE = """
import importlib, pkgutil
import not_hf
for module in pkgutil.walk_packages(not_hf.__path__, "not_hf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
not_hf.hub.checkpoint.MAPS = False
base, folder = sys.argv[1:]
donor = not_hf.DonorModel.from_base(base, layers=(1, 3))
donor.save_pretrained(folder)
model = not_hf.TransplantedForCausalLM.from_pretrained(folder, is_trainable=True)
rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
options = transformers.TrainingArguments(folder + "/run", max_steps=2, report_to=[], use_cpu=True)
arguments = {"args": options, "train_dataset": rows, "cache_prefix": True, "prefix_dir": folder + "/run/prefixes"}
not_hf.DonorTrainer(model, **arguments).train()
model.save_pretrained(folder)
not_hf.DonorModel.from_pretrained(folder, verify=True).save_pretrained(folder)
print(not_hf.TransplantedForCausalLM.from_pretrained(folder).active_donors)
"""


@pytest.mark.slow
def test_an_organ_lives_without_what_windows_lacks(base_folder, tmp_path):
    done = run_python("-c", HIDDEN + LIFE, base_folder("llama"), tmp_path / "donor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['default']"


def test_values_are_read_where_a_mapped_file_could_not_be_replaced(base_folder, monkeypatch, tmp_path):
    donor = organ(str(base_folder("llama")), 1)
    donor.save_pretrained(tmp_path)
    mapped = {name: view[...] for name, view in open_checkpoint(tmp_path).items()}
    monkeypatch.setattr(checkpoint, "MAPS", False)
    monkeypatch.setattr(torch, "from_file", None)
    views = open_checkpoint(tmp_path)
    assert all(torch.equal(view[...], mapped[name]) for name, view in views.items())
    assert all(view[...].untyped_storage().nbytes() == mapped[name].nbytes for name, view in views.items())
    assert same(DonorModel.from_pretrained(tmp_path), donor)


def test_a_folder_is_locked_by_a_file_elsewhere(base_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_lock, "fcntl", None)
    folder = tmp_path / "donor"
    with folder_lock.locked(folder) as is_locked:
        assert is_locked and folder_lock.may_be_locked(folder)
    assert not folder_lock.may_be_locked(folder)
    donor = organ(str(base_folder("llama")), 1)
    donor.save_pretrained(folder)
    assert holds(folder, donor) and not list(Path(folder).glob("*lock*"))
