"""Every operation of an organ's life, over set-ups × architectures, by the common tester."""

from __future__ import annotations

import inspect

import pytest

from testing.lifecycle import SETUPS, Tester
from testing.models import ENCODERS

ARCHITECTURES = (
    *("gpt2", "gpt_neox", "opt", "bloom", "falcon", "llama", "mistral", "mixtral", "qwen3", "qwen3_moe"),
    *("gemma3_text", "phi3", "olmo2", "gpt_oss", "smollm3", "cohere"),
    *("bert", "modernbert", "eurobert"),
)
CHECKS = [name for name in vars(Tester) if name.startswith("check_")]
LIVES = [(m, c) for c in CHECKS for m in ARCHITECTURES if not (m in ENCODERS and c == "check_generating")]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("model_type", "check"), LIVES)
def test_life_of_organs(check, model_type, setup, token_ids, tmp_path):
    run = getattr(Tester(model_type, SETUPS[setup], token_ids), check)
    run(tmp_path) if "folder" in inspect.signature(run).parameters else run()
