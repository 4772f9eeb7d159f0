"""Cutting an organ out of a model on the Hub: only its bytes travel, and what goes wrong never gives a wrong organ."""

from __future__ import annotations

import copy
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_hub import DEFAULT_TOKEN, Fault, Hub
from not_hf import (
    DonorConfig,
    DonorModel,
    TransplantedForCausalLM,
    compose,
)
from not_hf.architecture.upstream import resolve_commit
from not_hf.hub.partial_download import borrow_part, list_tensors
from testing.commands import is_one_line
from testing.cuts import FAULTS, SPAN, WIDE, cut, is_cut, nbytes, push, ranges, weights
from testing.models import tiny_model, tiny_tokenizer
from testing.processes import run_python

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.slow
def test_only_the_bytes_of_the_span_are_served(repo, hub, model):
    organ = cut(repo)
    assert is_cut(organ, model)
    assert organ.config.base_revision == HfApi().model_info(repo).sha
    headers = [record.bytes for record in weights(hub) if record.range.startswith(("bytes=0-7", "bytes=8-"))]
    served = sum(record.bytes for record in weights(hub)) - sum(headers)
    assert nbytes(organ) <= served <= 1.02 * nbytes(organ)
    assert sum(headers) < 10_000 * (1 + len(headers) // 2)
    assert all(record.status == 206 for record in weights(hub))
    touched = {Path(record.path).name for record in hub.requests if record.path.endswith(".safetensors")}
    shards = [file for file in HfApi().list_repo_files(repo) if file.endswith(".safetensors")]
    assert len(shards) == 1 or len(touched.intersection(shards)) < len(shards)


@pytest.mark.slow
def test_a_second_cut_reads_nothing(repo, hub, model):
    cut(repo)
    hub.requests.clear()
    assert is_cut(cut(repo), model)
    assert not weights(hub)
    hub.requests.clear()
    assert is_cut(cut(repo, revision=HfApi().model_info(repo).sha), model)
    assert not weights(hub)
    assert is_cut(DonorModel.from_base(repo, (2, 4)), model, (2, 4)) and weights(hub)  # another span is another matter


def test_what_is_borrowed_is_deleted_when_nobody_reads_it_any_more(repo, hub, model, cache):
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    where, read = {"revision": resolve_commit(repo, {})}, []

    def borrow() -> None:
        with borrow_part(repo, names, **where) as views:
            read.append({name: torch.cat(list(view.chunks())) for name, view in views.items()})

    other = threading.Thread(target=borrow)
    with borrow_part(repo, names, **where) as views:
        other.start()
        other.join(0.5)
        assert other.is_alive() and not read
        assert views.keys() == set(names) and all(Path(view.path).exists() for view in views.values())
    other.join(30)
    assert not list(cache.rglob("*.safetensors"))
    assert all(torch.equal(read[0][name], model.state_dict()[name].flatten()) for name in names)


@pytest.mark.slow
def test_force_download_reads_again(repo, hub, model):
    cut(repo)
    hub.requests.clear()
    assert is_cut(cut(repo, force_download=True), model)
    assert sum(record.bytes for record in weights(hub)) >= nbytes(cut(repo))


def test_offline_after_the_first_cut(repo, hub, model, monkeypatch):
    cut(repo)
    hub.requests.clear()
    assert is_cut(cut(repo, local_files_only=True), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_cut(cut(repo), model)
    assert not hub.requests
    with pytest.raises(OSError, match=r"neither layers-0-2 of .* are in the cache; go online once"):
        DonorModel.from_base(repo, (0, 2))


@pytest.mark.parametrize("folder", [None, "mine"])
def test_files_that_are_cached_whole_are_used(folder, repo, hub, model, tmp_path):
    where = {"cache_dir": tmp_path / folder} if folder else {}
    snapshot_download(repo, **where)
    hub.requests.clear()
    assert is_cut(cut(repo, **where), model)
    assert not weights(hub)


def test_cache_dir_holds_everything(repo, model, tmp_path, cache):
    organ = DonorModel.from_base(repo, SPAN, cache_dir=tmp_path / "mine")
    assert is_cut(organ, model)
    assert not cache.exists()
    assert list((tmp_path / "mine").rglob("layers-3-6.safetensors"))


@pytest.mark.slow
def test_a_revision_is_one_commit(hub, model):
    """A branch that moves while an organ is cut gives the organ of before, and its commit."""
    repo = HfApi().create_repo("me/moving").repo_id
    push(model, repo)
    before = HfApi().model_info(repo).sha
    other = tiny_model("llama", seed=1, **WIDE)
    moved = threading.Event()

    def move(method, path, headers):
        if path.startswith("/lfs/") and method == "GET" and not moved.is_set():
            moved.set()
            threading.Thread(target=push, args=(other, repo)).start()
            while HfApi().model_info(repo).sha == before:
                time.sleep(0.01)
        return None

    hub.fault = move
    organ = cut(repo)
    assert moved.is_set() and is_cut(organ, model) and organ.config.base_revision == before
    assert is_cut(cut(repo), other)
    assert is_cut(cut(repo, revision=before), model)


@pytest.mark.slow
def test_subfolder_branch_tag_and_pull_request(hub, model):
    repo = HfApi().create_repo("me/places").repo_id
    HfApi().create_branch(repo, branch="dev")
    push(model, repo, path_in_repo="inner", revision="dev")
    HfApi().create_tag(repo, tag="v1", revision="dev")
    push(model, repo, path_in_repo="inner", create_pr=True)
    for revision in ("dev", "v1", "refs/pr/1"):
        assert is_cut(cut(repo, revision=revision, subfolder="inner"), model)
    with pytest.raises((OSError, ValueError), match="me/places"):
        cut(repo, subfolder="inner")  # not on main


@pytest.mark.slow
def test_a_base_in_a_subfolder_is_found_again(hub, model, token_ids, tmp_path):
    """By the organ alone, and its tokenizer too; another model at the root is not taken for it."""
    repo = HfApi().create_repo("me/nested").repo_id
    push(tiny_model("llama", seed=1, **WIDE), repo)
    push(model, repo, path_in_repo="inner")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / "tokenizer", path_in_repo="inner")
    cut(repo, subfolder="inner").push_to_hub("me/nested-organ")
    expected = TransplantedForCausalLM.from_pretrained(copy.deepcopy(model), DonorModel.from_base(model, SPAN))
    loaded = TransplantedForCausalLM.from_pretrained("me/nested-organ")
    loaded.save_pretrained(tmp_path / "again")
    loaded.load_donor("me/nested-organ", "second", position=0)
    loaded.save_pretrained(tmp_path / "two")
    compose(["me/nested-organ"]).save_pretrained(tmp_path / "composed")
    for folder in ("again", "two", "composed"):
        config = DonorConfig.from_pretrained(tmp_path / folder)
        assert (config.base_model_name_or_path, config.base_subfolder) == (repo, "inner")
    with torch.no_grad():
        for name in ("again", "composed"):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert torch.equal(again(token_ids).logits, expected(token_ids).logits)
    assert AutoTokenizer.from_pretrained("me/nested-organ")("w5").input_ids == [5]


@pytest.mark.slow
def test_private_and_gated(hub, model, tmp_path):
    hub.add_user("you", "hf_you")
    repo = HfApi().create_repo("me/locked", private=True).repo_id
    push(model, repo)
    assert is_cut(cut(repo), model)
    with pytest.raises(OSError, match="me/locked"):
        DonorModel.from_base(repo, SPAN, token="hf_you", cache_dir=tmp_path / "1")
    HfApi().update_repo_settings(repo, private=False)
    hub.gate(repo)
    with pytest.raises(OSError, match=r"gated|restricted"):
        DonorModel.from_base(repo, SPAN, token="hf_you", cache_dir=tmp_path / "2")
    hub.gate(repo, users=("you",))
    assert is_cut(DonorModel.from_base(repo, SPAN, token="hf_you", cache_dir=tmp_path / "3"), model)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "gpt2", "gpt_neox", "qwen2_moe"])
def test_every_layout_of_the_hub(model_type, base_repo, base_folder):
    """Experts that have a tensor each, and names of all kinds."""
    stored = AutoModelForCausalLM.from_pretrained(base_folder(model_type))
    assert is_cut(DonorModel.from_base(base_repo(model_type), (1, 3)), stored, (1, 3))


def test_a_repo_without_safetensors_says_how_to_convert(hub, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    repo = HfApi().create_repo("me/pickled").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    with pytest.raises(OSError, match=r"pytorch_model\.bin, convert it first: .*save_pretrained") as raised:
        cut(repo)
    assert is_one_line(raised.value) and not weights(hub)


def test_list_tensors_reads_headers_alone(repo, hub, model):
    tensors = list_tensors(repo)
    assert sum(record.bytes for record in weights(hub)) < 20_000
    expected = model.state_dict()
    assert {name: tuple(info.shape) for name, info in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert {info.dtype for info in tensors.values()} == {"F32"}


@pytest.mark.slow
def test_xet_repos_are_cut_by_ranges_too(model, tmp_path):
    """By way of a Hub that fails in every way that passes."""
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="5MB")
    DonorModel.from_base(model, SPAN).save_pretrained(tmp_path / "expected")
    script = """
        import sys
        from huggingface_hub import HfApi
        from not_hf import DonorModel
        if sys.argv[1] == "push":
            HfApi().create_repo("me/xet-base")
            HfApi().upload_folder(repo_id="me/xet-base", folder_path=sys.argv[2])
        else:
            DonorModel.from_base("me/xet-base", (3, 6)).save_pretrained(sys.argv[2])
    """
    with Hub(tmp_path / "hub", xet=True) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": DEFAULT_TOKEN, "HF_HUB_DISABLE_XET": "0"}
        for step, place in (("push", folder), ("cut", tmp_path / "organ")):
            hub.requests.clear()
            if step == "cut":
                passing = [fault for name, fault in FAULTS.items() if name not in ("slow", "another file")]
                seen = ranges(hub, Fault(), lambda n: False)
                choose = hub.fault

                def failing(method, path, headers, seen=seen, choose=choose, passing=passing):
                    choose(method, path, headers)
                    return passing.pop() if passing and seen and "range" in headers else None

                hub.fault = failing
            home = str(tmp_path / step)
            done = run_python("-c", textwrap.dedent(script), step, place, HF_HOME=home, **environment)
            assert done.returncode == 0, done.stderr
            if step == "push":
                assert any(record.path.startswith("/cas/v1/xorbs") for record in hub.requests)
            else:
                assert not passing
        expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "organ"))
        size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
        served = [record for record in hub.requests if record.method == "GET" and record.status == 206]
        assert size < sum(record.bytes for record in served) < 1.5 * size  # some of them twice
