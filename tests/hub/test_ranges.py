"""Byte ranges over HTTP: joined, retried, gone on with, and never another file's bytes."""

from __future__ import annotations

import itertools
import re
import threading
import time
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file

from local_hub import Fault, Hub
from not_hf import (
    CorruptDonorError,
)
from not_hf.hub.partial_download import open_part
from not_hf.hub.ranges import Part, Piece, RemoteFile, coalesce, gather
from testing.commands import is_one_line
from testing.cuts import FAULTS, SPAN, WIDE, cut, is_cut, nbytes, push, ranges, weights
from testing.models import tiny_model
from testing.processes import run_python, start_python

pytestmark = pytest.mark.usefixtures("cache")


SINGLE_FIRST = ["single", pytest.param("sharded", marks=pytest.mark.slow)]


@pytest.mark.parametrize("repo", SINGLE_FIRST, indirect=True)
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
    assert is_cut(cut(repo), model)
    assert len(seen) > max(wrong)


@pytest.mark.parametrize("repo", SINGLE_FIRST, indirect=True)
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
    assert is_cut(cut(repo), model)


@pytest.mark.parametrize("repo", ["single"], indirect=True)
@pytest.mark.parametrize("shift", [4, 64, 4096])
def test_bytes_that_are_not_what_the_answer_claims_are_noticed(shift, repo, hub, model, cache):
    """Nothing in HTTP tells it; neighbouring ranges overlap a little and must agree."""
    ranges(hub, Fault(shift_range=shift), {3}.__contains__)
    with pytest.raises(OSError, match="contradict each other"):
        cut(repo)
    assert not list(cache.rglob("*.safetensors"))
    hub.fault = None
    assert is_cut(cut(repo), model)


def test_a_contradiction_ends_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr("not_hf.hub.ranges.MIN_PART", 1 << 14)
    file, answers = RemoteFile("https://hub/file", {}, "commit", 1 << 20, None), itertools.count()

    def read(self, start: int, end: int) -> bytearray:
        time.sleep(0.01)
        return bytearray([next(answers)]) * (end - start)

    monkeypatch.setattr(RemoteFile, "read", read)
    with pytest.raises(OSError, match="contradict each other at byte 16384"):
        gather([Piece(file, 0, 1 << 20, 0)], b"", tmp_path / "whole", "Downloading")
    assert next(answers) < 32  # of 64 parts: those that had begun
    assert [path.name for path in tmp_path.iterdir()] in ([], ["whole.lock"])


def test_a_download_that_broke_off_goes_on(repo, hub, model, monkeypatch):
    monkeypatch.setattr("not_hf.hub.ranges.TRIES", 1)
    monkeypatch.setattr("not_hf.hub.ranges.WORKERS", 1)
    before = ranges(hub, Fault(truncate=True), {3}.__contains__)
    with pytest.raises(OSError, match="cannot be read"):
        cut(repo)
    after = ranges(hub, Fault(), set().__contains__)
    assert is_cut(cut(repo), model)
    assert len(before) >= 4 and not set(before[:3]) & set(after)


@pytest.mark.slow
@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_a_killed_process_goes_on(repo, hub, model, tmp_path, monkeypatch):
    """SIGKILL in the middle, then a new process."""
    script = f"""if True:
        from not_hf import DonorModel
        from not_hf.hub import ranges
        ranges.MIN_PART = 1 << 18  # more and smaller parts
        DonorModel.from_base({repo!r}, {SPAN})
    """
    for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    home = str(tmp_path / "home")
    seen = ranges(hub, Fault(delay=0.4), lambda n: n >= 4)
    process = start_python("-c", script, output=tmp_path, HF_HOME=home)
    while len(seen) < 12 and process.exitcode is None:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode < 0
    assert len(list((tmp_path / "home").rglob("*.partial/*"))) > 2  # a draft and at least two parts
    hub.fault = None
    hub.requests.clear()
    done = run_python("-c", script, HF_HOME=home, HF_HUB_DISABLE_PROGRESS_BARS="0")
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
    assert is_cut(organ := cut(repo, force_download=force), model)
    served = sum(record.bytes for record in weights(hub))
    assert nbytes(organ) - kept <= served <= 1.02 * nbytes(organ) - kept
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_parts_of_something_else_are_not_used_nor_kept(repo, hub, model, cache):
    first, second, *others = unfinished(cache, repo, hub)
    for file in (first, *others):
        file.unlink()
    second.rename(second.with_name("0" * 32))
    assert is_cut(organ := cut(repo), model)
    assert sum(record.bytes for record in weights(hub)) >= nbytes(organ)
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_a_forced_download_that_fails_leaves_the_entry(repo, hub, model):
    cut(repo)
    ranges(hub, Fault(status=500), lambda n: n >= 2)
    with pytest.raises(OSError, match="cannot be read"):
        cut(repo, force_download=True)
    assert is_cut(cut(repo, local_files_only=True), model)


@pytest.mark.slow
@pytest.mark.parametrize("repo", ["single"], indirect=True)
def test_a_damaged_entry_is_fetched_again(repo, model, cache):
    cut(repo)
    (entry,) = cache.rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-100])
    with pytest.raises(CorruptDonorError, match="not a whole safetensors file"):
        cut(repo, local_files_only=True)
    assert is_cut(cut(repo), model)
    assert is_cut(cut(repo, local_files_only=True), model)


@pytest.mark.slow
def test_folders_of_like_names_have_entries_of_their_own(hub, model, tmp_path):
    repo = HfApi().create_repo("me/folders").repo_id
    other = tiny_model("llama", seed=1, **WIDE)
    long = "/".join("n" * 60 for _ in range(4))
    for folder, each in (("v/1", model), ("v--1", other), (long, model)):
        push(each, repo, path_in_repo=folder)
    assert is_cut(cut(repo, subfolder="v/1"), model)
    assert is_cut(cut(repo, subfolder="v--1"), other)
    assert is_cut(cut(repo, subfolder=long), model)


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


def test_parts_are_named_after_their_bytes_alone():
    file = RemoteFile("https://hub/file", {"authorization": "Bearer of one"}, "commit", 1 << 20, "etag")
    other = RemoteFile("https://hub/file", {"authorization": "Bearer of two"}, "commit", 1 << 20, "etag")
    other._stored_etag = "of the host that has answered meanwhile"
    assert Part(file, 8, 90, 0).name == Part(other, 8, 90, 0).name
    assert len({Part(file, *bounds).name for bounds in ((8, 90, 0), (9, 90, 0), (8, 91, 0), (8, 90, 1))}) == 4


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
