"""A wide model on the Hub, of which parts are read."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi

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
