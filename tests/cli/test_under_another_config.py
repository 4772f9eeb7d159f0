"""The commands on a model for images, of which they use what it makes of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from not_hf import DonorModel, TransplantedForImageTextToText, perplexity
from testing.commands import done
from testing.donors import organ, same
from testing.models import tiny_tokenizer
from testing.wrappers import prompt, wrapper

pytestmark = pytest.mark.slow
TEXT = "w3 w5 w9 w4 w8 w7 w12"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    wrapper("llava").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join([TEXT] * 30))
    return folder


def test_an_organ_is_cut_trained_and_merged(base, tmp_path):
    done("extract", base, "--layers", "1:3", "--mode", "replace", "-o", tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), DonorModel.from_base(base, (1, 3)))
    assert done("check", tmp_path / "organ", base)["compatible"]
    assert done("inspect", tmp_path / "organ")["config"]["layers"] == [1, 3]
    how = ("--data", base / "text.txt", "--block-length", 8, "--max-steps", 4, "--eval-data", base / "text.txt")
    trained = done("train", tmp_path / "organ", *how, "--cache-prefix", "-o", tmp_path / "trained")
    found = trained["metrics"]["perplexity"]
    assert found["after"] < found["before"]

    model = TransplantedForImageTextToText.from_pretrained(base, tmp_path / "trained")
    merged = done("merge", tmp_path / "trained", "-o", tmp_path / "merged")
    assert merged["architecture"] == "LlavaForConditionalGeneration"
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(loaded(**prompt("llava")).logits, model(**prompt("llava")).logits)


def test_text_is_written_and_measured(base, tmp_path):
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path / "organ")
    done("transplant", base, tmp_path / "organ", "-o", tmp_path / "both")
    named = [(base,), (tmp_path / "organ",), (tmp_path / "organ", "--base", base), (tmp_path / "both",)]
    texts = [done("generate", name, "w3 w5", *more, "--max-new-tokens", 6)["text"] for name, *more in named]
    assert texts[1] == texts[2] == texts[3]  # that of the base may be the same six words
    measured = done("eval", tmp_path / "organ", "--data", base / "text.txt")
    model = TransplantedForImageTextToText.from_pretrained(base, donor)
    for source in (model, str(tmp_path / "organ")):
        found = perplexity.compute(predictions=["\n".join([TEXT] * 30)], model=source, tokenizer=tiny_tokenizer())
        assert found["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-4)
    assert measured["perplexity_without_organ"] != measured["perplexity"]
