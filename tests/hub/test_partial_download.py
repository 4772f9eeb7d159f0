"""Cutting an organ out of a model on the Hub: only its bytes travel, and what goes wrong never gives a wrong organ."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from local_hub import DEFAULT_TOKEN, Fault, Hub
from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
    compose,
)
from not_hf.hub.checkpoint import DTYPES, open_checkpoint
from not_hf.hub.headers import BITS
from not_hf.hub.partial_download import list_tensors, open_part
from not_hf.hub.ranges import RemoteFile, coalesce
from testing.checkpoints import write_fp8, write_mxfp4
from testing.models import tiny_model, tiny_tokenizer

SPAN = (3, 6)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 8, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def model():
    """A llama of 8 layers with 2 MB each."""
    return tiny_model("llama", **WIDE)


@pytest.fixture(scope="module", params=["single", "sharded"])
def repo(request, hub, model, tmp_path_factory) -> str:
    """Its Hub ID, in one file or in many."""
    name = f"me/extract-{request.param}"
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="5GB" if request.param == "single" else "5MB")
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
    return name


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, hub) -> Path:
    """Empty caches, no waiting between tries, and no fault left behind."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    quick = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("not_hf.hub.ranges.time", quick)
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
    hub.requests.clear()
    yield tmp_path / "assets"
    hub.fault = None
    while hub.in_flight:  # answers that nobody waits for any more
        time.sleep(0.01)


def cut(source, **options) -> DonorModel:
    return DonorModel.from_base(source, SPAN, **options)


def same(organ: DonorModel, model, span=SPAN) -> bool:
    expected = DonorModel.from_base(model, span).state_dict()
    found = organ.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def nbytes(organ: DonorModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in organ.parameters())


def weights(hub: Hub) -> list:
    """Requests that were served bytes of weights."""
    return [record for record in hub.requests if record.method == "GET" and record.path.startswith("/lfs/")]


def is_one_line(error: BaseException) -> bool:
    return "\n" not in str(error).strip() and len(str(error)) < 600


# -------------------------------------------------------------- what is read


def test_only_the_bytes_of_the_span_are_served(repo, hub, model):
    organ = cut(repo)
    assert same(organ, model)
    assert organ.config.base_revision == HfApi().model_info(repo).sha
    headers = [record.bytes for record in weights(hub) if record.range.startswith(("bytes=0-7", "bytes=8-"))]
    served = sum(record.bytes for record in weights(hub)) - sum(headers)
    assert nbytes(organ) <= served <= 1.02 * nbytes(organ)
    assert sum(headers) < 10_000 * (1 + len(headers) // 2)
    assert all(record.status == 206 for record in weights(hub))
    touched = {Path(record.path).name for record in hub.requests if record.path.endswith(".safetensors")}
    shards = [file for file in HfApi().list_repo_files(repo) if file.endswith(".safetensors")]
    assert len(shards) == 1 or len(touched.intersection(shards)) < len(shards)


def test_a_second_cut_reads_nothing(repo, hub, model):
    cut(repo)
    hub.requests.clear()
    assert same(cut(repo), model)
    assert not weights(hub)
    hub.requests.clear()
    assert same(cut(repo, revision=HfApi().model_info(repo).sha), model)
    assert not weights(hub)
    assert same(DonorModel.from_base(repo, (2, 4)), model, (2, 4)) and weights(hub)  # another span is another matter


def test_force_download_reads_again(repo, hub, model):
    cut(repo)
    hub.requests.clear()
    assert same(cut(repo, force_download=True), model)
    assert sum(record.bytes for record in weights(hub)) >= nbytes(cut(repo))


def test_offline_after_the_first_cut(repo, hub, model, monkeypatch):
    cut(repo)
    hub.requests.clear()
    assert same(cut(repo, local_files_only=True), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(cut(repo), model)
    assert not hub.requests
    with pytest.raises(OSError, match=r"neither layers-0-2 of .* are in the cache; go online once"):
        DonorModel.from_base(repo, (0, 2))


def test_files_that_are_cached_whole_are_used(repo, hub, model):
    snapshot_download(repo)
    hub.requests.clear()
    assert same(cut(repo), model)
    assert not weights(hub)


def test_cache_dir_holds_everything(repo, model, tmp_path, cache):
    organ = DonorModel.from_base(repo, SPAN, cache_dir=tmp_path / "mine")
    assert same(organ, model)
    assert not cache.exists()
    assert list((tmp_path / "mine").rglob("layers-3-6.safetensors"))


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
    assert moved.is_set() and same(organ, model) and organ.config.base_revision == before
    assert same(cut(repo), other)
    assert same(cut(repo, revision=before), model)


def push(model, repo: str, **options) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, **options)


def test_subfolder_branch_tag_and_pull_request(hub, model):
    repo = HfApi().create_repo("me/places").repo_id
    HfApi().create_branch(repo, branch="dev")
    push(model, repo, path_in_repo="inner", revision="dev")
    HfApi().create_tag(repo, tag="v1", revision="dev")
    push(model, repo, path_in_repo="inner", create_pr=True)
    for revision in ("dev", "v1", "refs/pr/1"):
        assert same(cut(repo, revision=revision, subfolder="inner"), model)
    with pytest.raises((OSError, ValueError), match="me/places"):
        cut(repo, subfolder="inner")  # not on main


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


def test_private_and_gated(hub, model, tmp_path):
    hub.add_user("you", "hf_you")
    repo = HfApi().create_repo("me/locked", private=True).repo_id
    push(model, repo)
    assert same(cut(repo), model)
    with pytest.raises(OSError, match="me/locked"):
        DonorModel.from_base(repo, SPAN, token="hf_you", cache_dir=tmp_path / "1")
    HfApi().update_repo_settings(repo, private=False)
    hub.gate(repo)
    with pytest.raises(OSError, match=r"gated|restricted"):
        DonorModel.from_base(repo, SPAN, token="hf_you", cache_dir=tmp_path / "2")
    hub.gate(repo, users=("you",))
    assert same(DonorModel.from_base(repo, SPAN, token="hf_you", cache_dir=tmp_path / "3"), model)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "gpt2", "gpt_neox", "qwen2_moe"])
def test_every_layout_of_the_hub(model_type, base_repo, base_folder):
    """Experts that have a tensor each, and names of all kinds."""
    stored = AutoModelForCausalLM.from_pretrained(base_folder(model_type))
    assert same(DonorModel.from_base(base_repo(model_type), (1, 3)), stored, (1, 3))


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory) -> Path:
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4"))


def test_mxfp4_is_dequantized_as_transformers_does_it(mxfp4, hub, tmp_path, token_ids):
    repo = HfApi().create_repo("me/mxfp4").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=mxfp4)
    native = AutoModelForCausalLM.from_pretrained(mxfp4)
    hub.requests.clear()
    organ = DonorModel.from_base(repo, (1, 3))
    assert same(organ, native, (1, 3))
    assert {parameter.dtype for parameter in organ.parameters()} == {torch.bfloat16}
    served = sum(record.bytes for record in weights(hub))
    assert served < nbytes(organ)  # it travels quantized
    organ.save_pretrained(tmp_path / "organ")
    assert "quantization" not in (tmp_path / "organ" / "config.json").read_text()
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), native, (1, 3))

    model = TransplantedForCausalLM.from_pretrained(repo, tmp_path / "organ")
    with torch.no_grad():
        logits = model(token_ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(token_ids).logits, logits)


def test_fp8_is_dequantized_as_transformers_does_it(hub, tmp_path):
    write_fp8(tmp_path)
    repo = HfApi().create_repo("me/fp8").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    dequantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    for source in (tmp_path, repo):
        organ = DonorModel.from_base(source, (1, 3))
        assert organ.dtype == torch.bfloat16 and same(organ, dequantized, (1, 3))


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


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 64, b"\xff" * 64, (9).to_bytes(8, "little") + b'{"a":[]}}' + b"\0" * 9, b"<html>" * 20],
    ids=["empty", "zeros", "too long", "no tensors", "a page"],
)
def test_a_file_that_is_no_safetensors_is_refused(content, hub, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    repo = HfApi().create_repo("me/garbage", exist_ok=True).repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    with pytest.raises(CorruptDonorError) as raised:
        cut(repo)
    assert is_one_line(raised.value)


def test_a_header_that_contradicts_itself_is_refused_and_not_kept(hub, model, tmp_path, cache):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"shape":[512,256]', b'"shape":[512,255]', 20))
    repo = HfApi().create_repo("me/contradiction").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    with pytest.raises(CorruptDonorError, match="not a whole safetensors file"):
        cut(repo)
    assert not list(cache.rglob("*.safetensors"))


# -------------------------------------------------------------- what goes wrong

FAULTS = {
    "too many requests": Fault(status=429, retry_after=0),
    "server error": Fault(status=500),
    "half a body": Fault(truncate=True),
    "the whole file": Fault(ignore_range=True),
    "another range": Fault(shift_range=64, honest=True),
    "another file": Fault(etag="0" * 40),
    "slow": Fault(delay=1.5),
}


def ranges(hub: Hub, fault: Fault, wrong, of_headers: bool = False) -> list[str]:
    """Give the n-th range of layers, or of headers, a fault if `wrong(n)`; returns the list they are put on."""
    seen: list[str] = []
    lock = threading.Lock()

    def choose(method, path, headers):
        if method == "GET" and path.startswith("/lfs/") and "range" in headers:
            if headers["range"].startswith(("bytes=0-", "bytes=8-")) is not of_headers:
                return None
            with lock:
                seen.append(headers["range"])
                return fault if wrong(len(seen) - 1) else None
        return None

    hub.fault = choose
    return seen


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("of_headers", [True, False], ids=["header", "layers"])
def test_what_passes_is_retried(name, of_headers, repo, hub, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    wrong = {0, 1} if of_headers else {1, 2, 5}
    seen = ranges(hub, FAULTS[name], wrong.__contains__, of_headers)
    if name == "another file" and of_headers:  # the first ETag is the one that all others are held to
        with pytest.raises(OSError, match="has changed between two ranges"):
            cut(repo)
        hub.fault = None
    assert same(cut(repo), model)
    assert len(seen) > max(wrong)


@pytest.mark.parametrize("name", FAULTS)
def test_what_stays_is_one_clear_error_and_nothing_is_kept(name, repo, hub, model, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr("not_hf.hub.ranges.TRIES", 2)
    fault = FAULTS[name] if name != "slow" else Fault(delay=0.3)
    ranges(hub, fault, lambda n: n >= 2)
    with pytest.raises(OSError) as raised:
        cut(repo)
    assert is_one_line(raised.value)
    assert not list(cache.rglob("*.safetensors"))
    hub.fault = None
    assert same(cut(repo), model)


@pytest.mark.parametrize("repo", ["single"], indirect=True)
@pytest.mark.parametrize("shift", [4, 64, 4096])
def test_bytes_that_are_not_what_the_answer_claims_are_noticed(shift, repo, hub, model, cache):
    """Nothing in HTTP tells it; neighbouring ranges overlap a little and must agree."""
    ranges(hub, Fault(shift_range=shift), {3}.__contains__)
    with pytest.raises(OSError, match="contradict each other"):
        cut(repo)
    assert not list(cache.rglob("*.safetensors"))
    hub.fault = None
    assert same(cut(repo), model)


def test_a_download_that_broke_off_goes_on(repo, hub, model, monkeypatch):
    monkeypatch.setattr("not_hf.hub.ranges.TRIES", 1)
    monkeypatch.setattr("not_hf.hub.ranges.WORKERS", 1)
    before = ranges(hub, Fault(truncate=True), {3}.__contains__)
    with pytest.raises(OSError, match="cannot be read"):
        cut(repo)
    after = ranges(hub, Fault(), set().__contains__)
    assert same(cut(repo), model)
    assert len(before) >= 4 and not set(before[:3]) & set(after)


@pytest.mark.slow
@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_a_killed_process_goes_on(repo, hub, model, tmp_path):
    """SIGKILL in the middle, then a new process."""
    script = f"""if True:
        from not_hf import DonorModel
        from not_hf.hub import ranges
        ranges.MIN_PART = 1 << 18  # more and smaller parts
        DonorModel.from_base({repo!r}, {SPAN})
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE"):
        environment.pop(name, None)
    seen = ranges(hub, Fault(delay=0.4), lambda n: n >= 4)
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        while len(seen) < 12 and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert process.returncode < 0
    assert len(list((tmp_path / "home").rglob("*.partial/*"))) > 2  # a draft and at least two parts
    hub.fault = None
    hub.requests.clear()
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert re.search(rf"{repo} layers-3-6: +100%.*6\.\d\dM/6\.\d\dM .*B/s", done.stderr)  # a bar in bytes
    assert sum(record.bytes for record in weights(hub)) < 0.9 * nbytes(cut(repo))
    part = next((tmp_path / "home").rglob("layers-3-6.safetensors"))
    stored = {key: value for key, value in model.state_dict().items() if key in load_file(part)}
    assert all(torch.equal(tensor, stored[key]) for key, tensor in load_file(part).items()) and len(stored) == 27
    assert not list((tmp_path / "home").rglob("*.partial"))


def unfinished(cache: Path, repo: str, hub: Hub) -> list[Path]:
    """The parts that a cut fetched before it broke off."""
    ranges(hub, Fault(status=500), lambda n: n >= 5)
    with pytest.raises(OSError, match="cannot be read"):
        cut(repo)
    hub.fault = None
    hub.requests.clear()
    parts = sorted(file for file in cache.rglob("*.partial/*") if file.name != "draft")
    assert len(parts) > 2
    return parts


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_parts_are_not_believed_when_their_data_is_lost(force, repo, hub, model, cache):
    """As a crash of the machine may leave them: of the right size and without the data, cut short, or empty."""
    zeros, short, empty, *whole = unfinished(cache, repo, hub)
    kept = 0 if force else sum(file.stat().st_size for file in whole)
    zeros.write_bytes(zeros.read_bytes()[:4] + b"\0" * (zeros.stat().st_size - 4))
    short.write_bytes(short.read_bytes()[:-1])
    empty.write_bytes(b"")
    assert same(organ := cut(repo, force_download=force), model)
    served = sum(record.bytes for record in weights(hub))
    assert nbytes(organ) - kept <= served <= 1.02 * nbytes(organ) - kept
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_parts_of_something_else_are_not_used_nor_kept(repo, hub, model, cache):
    first, second, *others = unfinished(cache, repo, hub)
    for file in (first, *others):
        file.unlink()
    second.rename(second.with_name("0" * 32))
    assert same(organ := cut(repo), model)
    assert sum(record.bytes for record in weights(hub)) >= nbytes(organ)
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_a_forced_download_that_fails_leaves_the_entry(repo, hub, model):
    cut(repo)
    ranges(hub, Fault(status=500), lambda n: n >= 2)
    with pytest.raises(OSError, match="cannot be read"):
        cut(repo, force_download=True)
    assert same(cut(repo, local_files_only=True), model)


@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_a_damaged_entry_is_fetched_again(repo, model, cache):
    cut(repo)
    (entry,) = cache.rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-100])
    with pytest.raises(CorruptDonorError, match="not a whole safetensors file"):
        cut(repo, local_files_only=True)
    assert same(cut(repo), model)
    assert same(cut(repo, local_files_only=True), model)


def test_folders_of_like_names_have_entries_of_their_own(hub, model, tmp_path):
    repo = HfApi().create_repo("me/folders").repo_id
    other = tiny_model("llama", seed=1, **WIDE)
    long = "/".join("n" * 60 for _ in range(4))
    for folder, each in (("v/1", model), ("v--1", other), (long, model)):
        push(each, repo, path_in_repo=folder)
    assert same(cut(repo, subfolder="v/1"), model)
    assert same(cut(repo, subfolder="v--1"), other)
    assert same(cut(repo, subfolder=long), model)


def test_a_body_that_does_not_end_is_not_read_to_its_end(repo, hub, monkeypatch):
    """A server may say that it sends a range and send more."""
    find = RemoteFile.find(repo, "model.safetensors" if "single" in repo else "model-00001-of-00004.safetensors")
    whole = find.read(0, find.size)
    assert find.read(10, 20) == whole[10:20]
    ranges(hub, Fault(ignore_range=True, claim=True), lambda n: True, of_headers=True)
    received: list[int] = []
    raw = httpx2.Response.iter_raw

    def counted(self, *args, **kwargs):
        for chunk in raw(self, *args, **kwargs):
            received.append(len(chunk))
            yield chunk

    monkeypatch.setattr(httpx2.Response, "iter_raw", counted)
    with pytest.raises(OSError, match="bytes or more came instead of 8"):
        find.read(0, 8)
    assert sum(received) < find.size / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.replace(b'"shape":[512,256]', b'"shape":[256,256]'),
        lambda header: header.replace(b'"shape":[512,256]', b'"shape":["a",25]'),
        lambda header: header.replace(b'"shape":[512,256]', b'"shape":[-512,-2]'),
        lambda header: header.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1),
        lambda header: header.replace(b'"dtype":"F32"', b'"dtype":["F"]', 1),
        lambda header: header.replace(b"layers.4.input_layernorm", b"layers.3.input_layernorm"),
        lambda header: re.sub(rb"offsets\":\[(\d)", lambda found: b'offsets":[9', header, count=3),
        lambda header: re.sub(rb"(offsets\":\[)\d+,\d", rb"\g<1>0,1e99", header, count=1),
    ],
    ids=["length", "words", "negative", "dtype", "list", "twins", "overlap", "infinite"],
)
@pytest.mark.parametrize("place", ["folder", "repo"])
def test_headers_that_safetensors_refuses_are_refused(change, place, model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = change(whole[8 : 8 + size])
    assert header != whole[8 : 8 + size]
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
    with pytest.raises(SafetensorError):
        load_file(file)
    where = str(tmp_path)
    if place == "repo":
        where = HfApi().create_repo("me/odd-header", exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=where, folder_path=tmp_path)
    for attempt in (lambda: cut(where), lambda: list_tensors(where)):
        with pytest.raises(CorruptDonorError, match="not a whole safetensors file") as raised:
            attempt()
        assert is_one_line(raised.value)


def test_a_file_that_is_replaced_while_it_is_read_does_not_mix(model, tmp_path):
    other = tiny_model("llama", seed=1, **WIDE)
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    views = open_checkpoint(tmp_path / "a")
    os.replace(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    for view in views.values():
        with pytest.raises(CorruptDonorError, match="was written to while it was read"):
            view[...]


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
    bits = {name: 8 * (view.end - view.start) // 8 for name, view in views.items()}
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


def test_three_at_once_fetch_once(repo, hub, model):
    """Threads, for processes; models are not built in threads, which transformers does not allow for."""
    wanted = re.compile(r"model\.layers\.[345]\.")
    found: list[dict] = []

    def read() -> None:
        found.append(open_part(repo, wanted, "layers-3-6"))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {name: tensor for name, tensor in model.state_dict().items() if wanted.match(name)}
    assert len(found) == 3 and all(views.keys() == expected.keys() for views in found)
    assert all(torch.equal(view[...], expected[name]) for views in found for name, view in views.items())
    size = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert sum(record.bytes for record in weights(hub)) < 1.5 * size  # and not three times


# -------------------------------------------------------------- Xet


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
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": DEFAULT_TOKEN, "HF_HUB_DISABLE_XET": "0"}
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
            command = [sys.executable, "-c", textwrap.dedent(script), step, str(place)]
            done = subprocess.run(
                command, env={**environment, "HF_HOME": str(tmp_path / step)}, capture_output=True, text=True
            )
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


# -------------------------------------------------------------- the rule by which ranges are joined


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        (0, [(0, 10), (12, 20), (25, 30), (30, 40)]),
        (2, [(0, 20), (25, 40)]),
        (6, [(0, 20), (25, 40)]),
        (7, [(0, 40)]),
    ],
)
def test_coalesce_closes_the_narrowest_gaps_within_the_budget(spare, expected):
    found = coalesce([(25, 30), (0, 10), (30, 40), (12, 20)], spare)
    if spare == 0:
        expected = [(0, 10), (12, 20), (25, 40)]  # no gap costs nothing
    assert found == expected
