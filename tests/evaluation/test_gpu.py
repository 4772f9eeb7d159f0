"""What is measured on a GPU is what is measured on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from not_hf import (
    TransplantedForCausalLM,
    choose_scale,
    choose_span,
    compare_methods,
    compare_perplexity,
    perplexity,
    probe_privacy,
    require_isolation,
    sweep_positions,
    train_positions,
)
from testing.donors import tiny_organ
from testing.gpu import DEVICE, needs_gpu
from testing.models import tiny_model, tiny_tokenizer
from testing.training import rows

pytestmark = needs_gpu
TEXTS = [" ".join(f"w{3 + (7 * n + n * line) % 88}" for n in range(20 + 9 * line)) for line in range(8)]
ROWS = torch.randint(3, 90, (120, 12), generator=torch.Generator().manual_seed(0)).tolist()
HOW: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "max_length": 32}


def measured(device: str, folder: Any) -> list[float]:
    """What every measure gives; donors and texts are on the CPU."""
    base, donor = tiny_model("llama").to(device), tiny_organ(1, mode="replace")
    sweep = sweep_positions(base, donor, TEXTS, modes=("insert", "replace"), **HOW)
    numbers = [row["nats_per_token"] for row in (sweep.base, *sweep.rows)]
    arguments = {"report_to": "none", "disable_tqdm": True, "use_cpu": device == "cpu", "save_strategy": "no"}
    args = TrainingArguments(str(folder), max_steps=2, **arguments)
    found = train_positions(base, donor, TEXTS, [1], train_dataset=rows(), args=args, **HOW)
    numbers += [row["nats_per_token"] for row in found.rows]
    base.config.use_cache = False
    require_isolation(base)
    spans = choose_span(base, rows(), k=2)
    numbers += [score for _, score in sorted((span.layers, span.score) for span in spans)]
    model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="a")
    numbers += [compare_perplexity(None, model, TEXTS, **HOW)[f"model_{each}"]["perplexity"] for each in "ab"]
    choice = choose_scale(model, "a", TEXTS, scales=(0, 0.5, 1), **HOW)
    numbers += [perplexity.compute(predictions=TEXTS, model=model, **HOW)["perplexity"]]
    return numbers + [row["perplexity"] for row in choice.rows]


def test_evaluation(tmp_path):
    assert measured(DEVICE, tmp_path) == pytest.approx(measured("cpu", tmp_path), rel=1e-3)


def test_comparing_methods():
    how: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "block_length": 8, "budget": 1}
    texts, base = [" ".join(f"w{n}" for n in ids) for ids in ROWS], tiny_model("llama").to(DEVICE)
    found = compare_methods(base, texts, texts[:20], donors=[tiny_organ(1, mode="replace")], **how)
    assert not found.skipped and found.about["device"] == torch.device(DEVICE).type
    assert all(row["steps"] and row["peak_bytes"] for row in found.rows[1:-1])
    assert len(found.rows) == 5 and all(row["perplexity"] > 1 for row in found.rows)


def test_probing_privacy():
    options = {"tokenizer": tiny_tokenizer(), "prefix_length": 4, "with_random_layers": True}
    members, others = ([" ".join(f"w{n}" for n in ids) for ids in part] for part in (ROWS[:20], ROWS[20:]))
    gpu, here = (
        probe_privacy(tiny_organ(1, mode="replace"), members, others, base=tiny_model("llama").to(device), **options)
        for device in (DEVICE, "cpu")
    )
    for ours, theirs in zip(gpu.attacks, here.attacks, strict=True):
        assert ours["auc"] == pytest.approx(theirs["auc"], abs=0.02)
