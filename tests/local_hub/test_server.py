"""The local Hub, spoken to by the real client: what holds here is what the other tests rely on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    HfApi,
    HfFileSystem,
    snapshot_download,
)
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import get_session

from local_hub import Fault, Hub
from testing import ROOT
from testing.hub import WEIGHTS, once, read, served, upload
from testing.releases import since


def test_transformers_round_trip(api: HfApi, repo: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    model.push_to_hub(repo)
    assert AutoConfig.from_pretrained(repo).n_embd == 8
    loaded = AutoModelForCausalLM.from_pretrained(repo)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    info = api.model_info(repo)
    assert info.library_name == "transformers"
    assert {"gpt2", "safetensors"} < set(info.tags)
    assert "no endpoint for" not in caplog.text


def test_dataset_loads(api: HfApi, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset, load_dataset

    Dataset.from_dict({"text": ["a", "b", "c"]}).push_to_hub("me/server-data")
    api.upload_file(
        repo_id="me/server-data", repo_type="dataset", path_in_repo="extra.csv", path_or_fileobj=b"text\nd\n"
    )
    assert load_dataset("me/server-data", split="train", cache_dir=tmp_path)["text"] == ["a", "b", "c"]
    extra = load_dataset(
        "me/server-data", data_files="extra.csv", split="train", cache_dir=tmp_path, verification_mode="no_checks"
    )
    assert extra["text"] == ["d"]
    assert [found.id for found in api.list_datasets(search="server-d")] == ["me/server-data"]
    assert "no endpoint for" not in caplog.text


def test_file_system(api: HfApi, repo: str) -> None:
    upload(api, repo, "sub/model.bin", WEIGHTS)
    files = HfFileSystem()
    assert files.ls(f"{repo}/sub", detail=False) == [f"{repo}/sub/model.bin"]
    assert files.info(f"{repo}/sub/model.bin")["size"] == len(WEIGHTS)
    with files.open(f"{repo}/sub/model.bin", "rb", block_size=64) as file:
        file.seek(300)
        assert file.read(10) == WEIGHTS[300:310]
    with files.open(f"{repo}/new.txt", "w") as file:
        file.write("new")
    assert read(repo, "new.txt") == b"new"


@since("huggingface_hub", "2.2", "it waits otherwise")
def test_rate_limit_is_waited_for(hub: Hub, api: HfApi, repo: str, no_waiting: list[float]) -> None:
    upload(api, repo, "x.txt", b"1")
    hub.fault = once(Fault(status=429, retry_after=7), "GET", "/resolve/")
    assert read(repo, "x.txt") == b"1"
    assert [record.status for record in served(hub, "GET", "/resolve/")] == [429, 200]
    assert 8.0 in no_waiting  # the client adds a second


@since("huggingface_hub", "2.2", "it closes its client for good when a server is gone")
def test_cached_files_outlive_the_hub(tmp_path: Path, no_waiting: list[float]) -> None:
    with Hub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint)
        repo = api.create_repo("me/gone").repo_id
        commit = upload(api, repo, "model.bin", WEIGHTS)
        cache = {"cache_dir": tmp_path / "cache", "endpoint": hub.endpoint}
        snapshot_download(repo, **cache)
    hub.requests.clear()
    assert read(repo, "model.bin", **cache) == WEIGHTS
    assert read(repo, "model.bin", **cache, local_files_only=True) == WEIGHTS
    assert commit in snapshot_download(repo, **cache, local_files_only=True)
    with pytest.raises(LocalEntryNotFoundError):
        read(repo, "other.bin", **cache)
    assert hub.requests == []  # connections that the client kept open were cut

    with Hub(tmp_path / "hub") as restarted:
        assert HfApi(endpoint=restarted.endpoint).model_info(repo).sha == commit
        new = {"cache_dir": tmp_path / "new cache", "endpoint": restarted.endpoint}
        assert read(repo, "model.bin", **new) == WEIGHTS


def test_unknown_address_is_an_error_and_a_logged_line(hub: Hub, api: HfApi, caplog: pytest.LogCaptureFixture) -> None:
    answer = get_session().get(f"{hub.endpoint}/api/nothing")
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "UnknownEndpoint")
    assert "no endpoint for GET /api/nothing" in caplog.text


def test_command_line_serves_until_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "local_hub", "--root", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint = process.stdout.readline().strip()
            assert HfApi(endpoint=endpoint).whoami()["name"] == "me"
        finally:
            process.kill()
