"""A GPU for the tests that need one, and how its results are held against the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from testing.models import TOKEN_IDS, logits, tiny_model

DEVICE = "cuda:0"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def on_gpu(model_type: str, **options: Any) -> PreTrainedModel:
    """A tiny model there."""
    return tiny_model(model_type).to(DEVICE, **options)


def scores(model: PreTrainedModel) -> torch.Tensor:
    """Logits of the prompt, computed where the model is, `(batch, seq, vocab)` in float32 on the CPU."""
    return logits(model, TOKEN_IDS.to(model.device)).float().cpu()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=1e-4, rtol=1e-4)


def require_on_gpu(model: torch.nn.Module) -> None:
    """All of it, organs that are switched off and layers that were replaced included."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model._surgery.parked(model) if hasattr(model, "_surgery") else ():
        tensors += [*module.parameters(), *module.buffers()]
    assert {str(tensor.device) for tensor in tensors} == {DEVICE}
