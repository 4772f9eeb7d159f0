"""Fixtures of the suite: a closed network, a Hub of our own, and tiny models shared by the session."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# huggingface_hub and datasets read these once, when they are imported.
_HOME = tempfile.mkdtemp(prefix="not-hf-tests-")
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("HF_HUB_OFFLINE", None)
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from architectures import VOCAB, tiny_model
from transformers import PreTrainedModel

torch.set_num_threads(1)  # tiny tensors: more threads only contend with the other test workers


@pytest.fixture(scope="session")
def token_ids() -> torch.Tensor:
    """Random prompt tokens without padding, `(batch=2, seq=9)`."""
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory):
    """A function giving the folder of a tiny base by model type; saved once, in shards."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(f"{model_type}-")
            tiny_model(model_type).save_pretrained(made[model_type], max_shard_size="20KB")
        return made[model_type]

    return folder


@pytest.fixture
def fresh_base():
    """A function giving a fresh tiny model, which the test may change."""

    def make(model_type: str = "llama", **overrides) -> PreTrainedModel:
        return tiny_model(model_type, **overrides)

    return make
