"""The plugin of vLLM: what it sees of a command line, what it merges, what vLLM is told. vLLM itself is not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM
from not_hf.recipient import vllm_plugin
from not_hf.recipient.vllm_plugin import REDIRECT, serve_donor, served_model
from testing import ROOT
from testing.donors import organ
from testing.models import exact_logits as logits


@pytest.fixture
def at_exit(tmp_path, monkeypatch) -> list[Callable[[], object]]:
    """No redirection, and what is to be done when the process ends; scratch folders are below `tmp_path`."""
    monkeypatch.setenv(REDIRECT, "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found: list[Callable[[], object]] = []
    monkeypatch.setattr(vllm_plugin.atexit, "register", found.append)
    return found


@pytest.fixture(scope="module")
def donor(base_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("donor")
    organ(base_folder("llama"), 1).save_pretrained(folder)
    return folder


def serve(monkeypatch, *command: str | Path) -> dict[str, str]:
    """What vLLM is told to take for what."""
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    serve_donor()
    redirect = os.environ[REDIRECT]
    return json.loads(Path(redirect).read_text()) if redirect else {}


def test_the_entry_point_is_that_function():
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = entry_points["vllm.general_plugins"].items()
    assert EntryPoint(name, value, "vllm.general_plugins").load() is serve_donor


def test_a_process_that_serves_something_else_imports_nothing():
    code = "import sys, not_hf.recipient.vllm_plugin as p; p.serve_donor(); print({'torch', 'vllm'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("vllm serve me/x", "me/x"),
        ("vllm serve me/x --model me/y", "me/x"),
        ("vllm serve --port 1 --model me/x", "me/x"),
        ("main.py serve --model=me/x", "me/x"),
        ("vllm serve", None),
        ("vllm serve --model", None),
        ("vllm bench serve --model me/x", None),
        ("/a/b/api_server.py --model me/x", "me/x"),
        ("train.py --model me/x", None),
        ("", None),
    ],
)
def test_the_model_on_a_command_line(command, model):
    assert served_model(command.split()) == model


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"delta": "bfloat16"}], ids=["whole", "delta"])
def test_what_is_served_is_the_merged_model(form, donor, tmp_path, at_exit, monkeypatch, token_ids):
    name = tmp_path / "given"
    DonorModel.from_pretrained(donor).save_pretrained(name, **form)
    (folder,) = {*serve(monkeypatch, "vllm", "serve", name, "--port", "8000").values()}
    assert Path(folder).is_relative_to(tmp_path)
    native = AutoModelForCausalLM.from_pretrained(folder)
    assert native.config.model_type == "llama" and native.config.num_hidden_layers == 6
    assert torch.equal(logits(native, token_ids), logits(TransplantedForCausalLM.from_pretrained(name), token_ids))
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(name).get_vocab()
    redirect = os.environ[REDIRECT]
    serve_donor()  # as in the other processes, which inherit the variable
    assert os.environ[REDIRECT] == redirect and len(at_exit) == 1
    at_exit[0]()
    assert not Path(folder).exists() and name.exists()


def test_an_id_and_its_folder_in_the_cache(base_repo, at_exit, monkeypatch):
    organ(base_repo("llama"), 1).push_to_hub("me/vllm-organ")
    redirected = serve(monkeypatch, "vllm", "serve", "--model", "me/vllm-organ")
    offline = snapshot_download("me/vllm-organ", ignore_patterns="*", local_files_only=True)
    assert redirected.keys() == {"me/vllm-organ", offline} and len({*redirected.values()}) == 1
    assert AutoModelForCausalLM.from_pretrained(redirected["me/vllm-organ"]).config.num_hidden_layers == 6


def test_what_is_no_donor_is_left_to_vllm(base_folder, base_repo, at_exit, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("[")
    for name in (base_folder("llama"), base_repo("llama"), tmp_path, "me/nothing-there", "s3://bucket/model", "a//b"):
        assert serve(monkeypatch, "vllm", "serve", name) == {}
    assert not at_exit and not list(tmp_path.glob("not-hf-vllm-*"))


def test_what_cannot_be_served(donor, at_exit, monkeypatch, tmp_path):
    with pytest.raises(NotHFError, match="leave out --revision"):
        serve(monkeypatch, "vllm", "serve", donor, "--revision=v1")
    DonorModel.from_pretrained(donor).save_pretrained(tmp_path / "moved")
    text = (tmp_path / "moved" / "config.json").read_text()
    (tmp_path / "moved" / "config.json").write_text(text.replace("base_model_name_or_path", "unknown"))
    with pytest.raises(NotHFError, match="does not name its base"):
        serve(monkeypatch, "vllm", "serve", tmp_path / "moved")
    assert not os.environ[REDIRECT]
