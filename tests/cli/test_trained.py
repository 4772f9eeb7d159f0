"""What `not-hf train` saves beside the organ: the tokenizer that it was trained with, and what is measured with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from not_hf import DonorConfig, DonorModel, TransplantedForCausalLM, perplexity
from testing.commands import done, invoke
from testing.models import tiny_model, tiny_tokenizer
from testing.training import CHAT_TEMPLATE, chat

TRAINING = ("--block-length", "16", "--max-steps", "1", "--batch-size", "4")
NEW = ["<verse>", "<chapter>"]
TEXT = "\n".join(" ".join(f"w{3 + (7 * line + n) % 90}" for n in range(20)) for line in range(8))


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


@pytest.mark.slow
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
def test_a_training_over_another_leaves_no_chat_template_of_it(verses, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    done("train", verses, "--data", verses / "text.txt", "-o", out, *TRAINING, "--force")
    assert AutoTokenizer.from_pretrained(out).chat_template is None


@pytest.mark.slow
def test_new_tokens_stay_with_the_organ_and_are_measured(base, verses, tmp_path):
    text, out = verses / "text.txt", tmp_path / "out"
    perplexity.add_batch(predictions=["w5 w6 w7"])  # which the command leaves waiting
    for options in ((), ("--base", base, "--force")):
        shown = invoke("train", verses, "--data", text, "--eval-data", text, "-o", out, *TRAINING, *options)
        assert shown.exit_code == 0, shown.stderr
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(NEW) == [96, 97]
        found = DonorConfig.from_pretrained(out).metrics["perplexity"]
        assert "before" not in found and f" {found['after']:.4g} with the organ (" in shown.stdout
        result = invoke("eval", out, "--data", text, "--json", *options[:2])
        assert json.loads(result.stdout)["perplexity"] == found["after"]
        assert "not measured without the organ, which has the only rows for some tokens" in result.stderr
    waiting = perplexity.compute(model=tiny_model("llama"), tokenizer=tiny_tokenizer(), add_start_token=False)
    assert waiting["num_tokens"] == 2


@pytest.fixture
def both(base: Path, tmp_path: Path) -> Path:
    """A composition of an organ in bfloat16 and one in float32, and a text beside it."""
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (0, 1)), donor_name="low")
    model.load_donor(DonorModel.from_base(base, (2, 3)), "top")
    model.save_pretrained(tmp_path / "both")
    DonorModel.from_base(base, (0, 1)).to(torch.bfloat16).save_pretrained(tmp_path / "both/low")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "both"


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--max-steps", "1"), ("--epochs", "0")])
def test_each_organ_is_saved_in_its_own_dtype(how, both, tmp_path):
    arguments = ("--data", tmp_path / "text.txt", "--block-length", "16", *how)
    shown = done("train", both, *arguments, "-o", tmp_path / "out")
    assert shown["tokens_seen"] == (8 * 16 if shown["steps"] else 0)
    for name, dtype in (("low", torch.bfloat16), ("top", torch.float32)):
        saved = load_file(tmp_path / "out" / name / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {dtype}


@pytest.mark.slow
def test_where_no_organ_is_active_the_model_is_measured_once(both, base, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(both)
    model.set_donor([])
    model.save_pretrained(both)
    shown = done("eval", both, "--data", tmp_path / "text.txt")
    assert shown["without_organ"] is shown["perplexity_without_organ"] is shown["change"] is None
    assert shown["perplexity"] == done("eval", base, "--data", tmp_path / "text.txt")["perplexity"]
    assert "the organ" not in invoke("eval", both, "--data", tmp_path / "text.txt").stdout


@pytest.mark.slow
def test_an_inactive_organ_is_not_said_to_be_trained(both, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(both)
    model.donor_config["top"].metrics = {"perplexity": {"after": 3.0}}
    model.set_donor("low")
    model.save_pretrained(both)
    arguments = ("--data", tmp_path / "text.txt", "--block-length", "16", "--max-steps", "1", "--domain", "words")
    done("train", both, *arguments, "-o", tmp_path / "out")
    low, top = (DonorConfig.from_pretrained(tmp_path / "out" / name) for name in ("low", "top"))
    assert (low.domain, low.datasets, low.tokens_seen) == ("words", ["text.txt"], 128)
    assert (top.domain, top.datasets, top.tokens_seen) == (None, None, None)
    assert top.metrics == {"perplexity": {"after": 3.0}}
