"""A wide model on the Hub, of which parts are read, and empty caches."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from testing.cuts import WIDE
from testing.models import tiny_model


@pytest.fixture(scope="session")
def model():
    """A llama of 8 layers with 2 MB each."""
    return tiny_model("llama", **WIDE)


@pytest.fixture(scope="session", params=["single", "sharded"])
def repo(request, hub, model, tmp_path_factory) -> str:
    """Its Hub ID, in one file or in many."""
    name = f"me/extract-{request.param}"
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="5GB" if request.param == "single" else "5MB")
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder)
    return name


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
