"""`not-hf generate` with options that a model brings along, and at the end of its context."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from transformers import GenerationConfig

from not_hf import DonorModel
from testing.commands import done, failed
from testing.models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow
PROMPT = "w3 w4 w5 w3 w4"
HOW = ("--max-new-tokens", "6", "--compare")


def saved(model_type: str, folder: Path) -> tuple[Path, Path]:
    """A base and a donor of it."""
    model = tiny_model(model_type)
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    DonorModel.from_base(folder / "base", (1, 3)).save_pretrained(folder / "donor")
    return folder / "base", folder / "donor"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 2},
        {"prefill_chunk_size": 2},
        {"token_healing": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_generation_config_leave_the_text_as_it_is(options, llama):
    base, donor = llama
    (base / "generation_config.json").unlink(missing_ok=True)
    expected = done("generate", donor, PROMPT, *HOW)
    GenerationConfig(**options).save_pretrained(base)
    assert done("generate", donor, PROMPT, *HOW) == expected


def test_stop_strings_of_the_generation_config_end_the_text(tmp_path):
    base, donor = saved("llama", tmp_path)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens("abcdef")  # transformers decodes each token behind this word, to see its spaces
    tokenizer.save_pretrained(donor)
    words = done("generate", donor, PROMPT, *HOW[:2])["text"].split()
    GenerationConfig(stop_strings=[words[1]]).save_pretrained(base)
    assert done("generate", donor, PROMPT, *HOW[:2])["text"].split() == words[:2]


def test_the_context_ends_where_positions_are_a_table(tmp_path, llama):
    _, donor = saved("gpt2", tmp_path)
    prompt = " ".join(["w3"] * 30)
    for more in ((), ("--compare",)):
        reason = "context of 64 tokens has room for 35 new ones, not 40; use --max-new-tokens 35"
        assert reason in failed("generate", donor, prompt, *more)
        done("generate", donor, prompt, "--max-new-tokens", 35, *more)
        assert "the prompt has 65 tokens, and the context 64; shorten" in failed("generate", donor, "w3 " * 65, *more)
    assert len(done("generate", llama[1], prompt, "--max-new-tokens", 50)["text"].split()) == 50  # rotary ones go on
