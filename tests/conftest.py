"""Fixtures of the suite: a closed network, a Hub of our own, and tiny models shared by the session."""

from __future__ import annotations

import gc
import os
import socket
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from local_hub import DEFAULT_TOKEN, Hub

# huggingface_hub and datasets read these once, when they are imported: so the Hub must be up before that.
assert "huggingface_hub" not in sys.modules, "HF_ENDPOINT is read when huggingface_hub is imported"
_FOLDER = tempfile.TemporaryDirectory(prefix="not-hf-tests-")
_HUB = Hub(Path(_FOLDER.name, "hub")).start()
os.environ.update(
    HF_ENDPOINT=_HUB.endpoint,
    HF_TOKEN=DEFAULT_TOKEN,
    HF_HOME=str(Path(_FOLDER.name, "home")),
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # tiny tensors: more threads only contend with the other workers, in subprocesses too
)
os.environ.pop("HF_HUB_OFFLINE", None)

import torch
from datasets import Dataset
from huggingface_hub import HfApi, constants, repocard

from not_hf.cards.common import warn_once
from not_hf.training.data import pack
from testing.models import TOKEN_IDS, tiny_model, tiny_tokenizer
from testing.shapes import FAST

_session = repocard.get_session


def _session_of_the_test_hub():
    """Have huggingface_hub 1, which asks huggingface.co in any case, ask the Hub of `HF_ENDPOINT` to check a card."""
    session, ask = (
        _session(),
        lambda url, **sent: session.post(url.replace("https://huggingface.co", _HUB.endpoint), **sent),
    )
    return types.SimpleNamespace(post=ask)


repocard.get_session = _session_of_the_test_hub
_connect = socket.socket.connect


def _connect_locally(self: socket.socket, address) -> None:
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError(f"the test-suite is cut off from the network, yet something connects to {address}")
    _connect(self, address)


socket.socket.connect = _connect_locally


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is tried with one more architecture as slow."""
    for item in items:
        model_type = item.callspec.params.get("model_type", FAST[0]) if hasattr(item, "callspec") else FAST[0]
        if model_type not in FAST:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections of garbage, of which each training makes one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def warn_again() -> None:
    """Warnings that are told once in a process are told in each test, whichever came before."""
    warn_once.cache_clear()


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """The Hub that HF_ENDPOINT names; the default token is user `me`'s."""
    yield _HUB
    _HUB.stop()
    _FOLDER.cleanup()


@pytest.fixture
def api(hub: Hub) -> Iterator[HfApi]:
    """A client of the Hub, whose record of requests is empty and which does not fail any more afterwards."""
    hub.requests.clear()
    yield HfApi()
    hub.fault = None


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be waited between tries, and were not."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Random prompt tokens without padding, `(batch=2, seq=9)`."""
    return TOKEN_IDS.clone()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny base with its tokenizer, by model type; saved once, in shards."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(f"{model_type}-")
            tiny_model(model_type).save_pretrained(made[model_type], max_shard_size="20KB")
            tiny_tokenizer().save_pretrained(made[model_type])
        return made[model_type]

    return folder


@pytest.fixture
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


@pytest.fixture(scope="session")
def base_repo(hub: Hub, base_folder: Callable[[str], Path]) -> Callable[[str], str]:
    """The Hub ID of the same tiny base, by model type; pushed once."""
    made: dict[str, str] = {}

    def repo(model_type: str) -> str:
        if model_type not in made:
            made[model_type] = HfApi().create_repo(f"me/tiny-{model_type}").repo_id
            HfApi().upload_folder(repo_id=made[model_type], folder_path=base_folder(model_type))
        return made[model_type]

    return repo


@pytest.fixture(scope="session")
def blocks() -> Dataset:
    """24 blocks of 16 tokens, in which every word is followed by the next."""
    lines = [" ".join(f"w{3 + (start + n) % 90}" for n in range(29)) for start in range(0, 90, 6)]
    return pack(Dataset.from_dict({"text": lines}), tiny_tokenizer(), block_length=16)
