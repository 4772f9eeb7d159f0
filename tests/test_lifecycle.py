"""Every operation of an organ's life, over set-ups × architectures, by the common tester."""

from __future__ import annotations

import inspect

import pytest
from testing_common import SETUPS, Tester

ARCHITECTURES = (
    *("gpt2", "gpt_neox", "opt", "bloom", "falcon", "llama", "mistral", "mixtral", "qwen3", "qwen3_moe"),
    *("gemma3_text", "phi3", "olmo2", "gpt_oss", "smollm3", "cohere"),
)
CHECKS = [name for name in vars(Tester) if name.startswith("check_")]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("check", CHECKS)
def test_life_of_organs(check, model_type, setup, token_ids, tmp_path):
    run = getattr(Tester(model_type, SETUPS[setup], token_ids), check)
    run(tmp_path) if "folder" in inspect.signature(run).parameters else run()
