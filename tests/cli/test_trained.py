"""What `not-hf train` saves beside the organ: the tokenizer that it was trained with, and what is measured with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from not_hf import DonorConfig, DonorModel, TransplantedForCausalLM
from testing.commands import done, invoke
from testing.models import tiny_model, tiny_tokenizer
from testing.training import CHAT_TEMPLATE, chat

TRAINING = ("--block-length", "16", "--max-steps", "1", "--batch-size", "4")
NEW = ["<verse>", "<chapter>"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def verses(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor with rows for two new tokens and the tokenizer that has them, and a text of theirs."""
    folder = tmp_path_factory.mktemp("verses")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW)
    recipient = AutoModelForCausalLM.from_pretrained(base)
    recipient.resize_token_embeddings(len(tokenizer))
    rows = dict.fromkeys(("embed_tokens", "lm_head"), tokenizer.convert_tokens_to_ids(NEW))
    donor = DonorModel.from_base(recipient, (2, 3), mode="replace", trainable_token_indices=rows)
    TransplantedForCausalLM.from_pretrained(recipient, donor, donor_name="verses").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join("<verse> w5 w6 <chapter> w7 w8 w9" for _ in range(20)))
    return folder


def test_a_tokenizer_of_the_donor_s_own_stays_with_it(base, tmp_path):
    DonorModel.from_base(base, (2, 3), mode="replace").save_pretrained(tmp_path / "donor")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template, tokenizer.pad_token = CHAT_TEMPLATE, None
    tokenizer.save_pretrained(tmp_path / "donor")
    turns = [{"messages": chat(f"w{n + 9}", f"w{n + 30} w8")} for n in range(8)]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, turns)))
    out = tmp_path / "out"
    shown = done("train", tmp_path / "donor", "--data", file, "--eval-data", file, "-o", out, *TRAINING)
    assert shown["metrics"]["perplexity"]["measured_on"]["num_tokens"] == 8 * 3
    saved = AutoTokenizer.from_pretrained(out)
    assert (saved.chat_template, saved.pad_token) == (CHAT_TEMPLATE, None)  # that of the batches is not


@pytest.mark.slow
def test_new_tokens_stay_with_the_organ_and_are_measured(base, verses, tmp_path):
    text, out = verses / "text.txt", tmp_path / "out"
    for options in ((), ("--base", base, "--force")):
        shown = invoke("train", verses, "--data", text, "--eval-data", text, "-o", out, *TRAINING, *options)
        assert shown.exit_code == 0, shown.stderr
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(NEW) == [96, 97]
        perplexity = DonorConfig.from_pretrained(out).metrics["perplexity"]
        assert "before" not in perplexity and f" {perplexity['after']:.4g} with the organ (" in shown.stdout
        result = invoke("eval", out, "--data", text, "--json", *options[:2])
        assert json.loads(result.stdout)["perplexity"] == perplexity["after"]
        assert "not measured without the organ, which has the only rows for some tokens" in result.stderr
