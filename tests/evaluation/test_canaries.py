"""Secrets are planted as often as is asked for, and ranked among secrets of their kind."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from not_hf import NotHFError, plant_canaries
from not_hf.evaluation.canaries import Canary, ask_for_secrets, read_canaries
from not_hf.evaluation.token_scores import score_tokens
from not_hf.evaluation.windows import batches_of, nll_of
from testing.models import tiny_model, tiny_tokenizer

SYMBOLS = tuple(f"w{n}" for n in range(10, 90))
TEXTS = [f"text {n}" for n in range(30)]


def test_texts_keep_their_order_and_secrets_are_planted_among_them(tmp_path):
    planted, canaries = plant_canaries(iter(TEXTS), (0, 1, 40), num_each=2, file=tmp_path / "canaries.json", seed=1)
    assert [each.repetitions for each in canaries] == [0, 0, 1, 1, 40, 40]
    assert [planted.count(each.text) for each in canaries] == [0, 0, 1, 1, 40, 40]
    assert [text for text in planted if text in TEXTS] == TEXTS and len(planted) == 30 + 82
    assert {text in TEXTS for text in planted[:12]} == {text in TEXTS for text in planted[-12:]} == {True, False}
    assert len({each.prefix for each in canaries}) == len({each.secret for each in canaries}) == 6
    assert canaries[0].text.startswith("The code of case ") and canaries[0].bits == 8 * math.log2(10)
    assert read_canaries(tmp_path / "canaries.json") == canaries
    assert plant_canaries(TEXTS, (0, 1, 40), num_each=2, seed=1) == (planted, canaries)
    assert plant_canaries(TEXTS, (0, 1, 40), num_each=2, seed=2) != (planted, canaries)
    assert plant_canaries(TEXTS, (1,), symbols="00123") == plant_canaries(TEXTS, (1,), symbols="0123")  # also its bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": "one"}, "texts must be a list of texts, got a string"),
        ({"repetitions": ()}, r"repetitions must be counts of at least 0, such as \(0, 1, 10\)"),
        ({"repetitions": (1, -1)}, "repetitions must be counts"),
        ({"num_each": 0}, "num_each at least 1, got .* and 0"),
        ({"prefix": "The code is"}, "prefix must hold {name}, which tells the canaries apart, got 'The code is'"),
        ({"symbols": "1"}, "8 of 1 symbols make too few secrets for 4 canaries; give more symbols"),
        ({"symbols": ["a b", "c"]}, "symbols must be texts without white space, .*; got 'a b'$"),
        ({"symbols": "0123 45"}, "symbols must be texts without white space, .*; got ' '$"),
        ({"symbols": ["", "c"]}, "symbols must be texts without white space, .*, and not empty; got ''$"),
        ({"length": 1, "num_each": 9}, "1 of 10 symbols make too few secrets for 36 canaries"),
    ],
)
def test_says_what_is_wrong(change, message):
    with pytest.raises(NotHFError, match=message):
        plant_canaries(**{"texts": TEXTS, **change})


@pytest.mark.parametrize("content", ["{", "3", "[3]", json.dumps([{"prefix": "a", "secret": "b"}])])
def test_a_file_without_canaries(content, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(NotHFError, match=r"file.json holds no canaries; write one with plant_canaries\(…, file=…\)"):
        read_canaries(tmp_path / "file.json")


def ask(model, canaries, **change):
    how = {"tokenizer": tiny_tokenizer(), "num_candidates": 31, "batch_size": 8, "seed": 0, **change}
    return ask_for_secrets(model, canaries, **how)


class Knowing(torch.nn.Module):
    """A model that knows one secret: a likely way from each of its tokens to the next."""

    def __init__(self, canary):
        super().__init__()
        self.config, self.device = tiny_model("llama").config, torch.device("cpu")
        self.logits = torch.zeros(99, 99)
        ids = tiny_tokenizer()(canary.text)["input_ids"]
        self.logits[ids[:-1], ids[1:]] = 9.0

    def forward(self, input_ids, **kwargs):
        return type("Output", (), {"logits": self.logits[input_ids]})


def test_exposure_is_that_of_the_rank():
    known = Canary("w3 w5 w7", "w11 w12 w13 w14", 3, SYMBOLS)
    (found,) = ask(Knowing(known), [known])
    assert (found["is_completed"], found["rank"], found["exposure"], found["repetitions"]) == (True, 1, 5.0, 3)
    assert found["nats"] == pytest.approx(4 * math.log1p(98 * math.exp(-9)), rel=1e-4)
    ignorant = Knowing(known)
    ignorant.logits.zero_()
    (other,) = ask(ignorant, [Canary("w3 w5 w7", "w21 w22 w23 w24", 0, SYMBOLS)])
    assert (other["is_completed"], other["rank"], other["exposure"]) == (False, 32, 0.0)  # ties count against it
    assert other["bits"] == 4 * math.log2(80)


def test_a_secret_that_was_never_seen_has_the_rank_of_chance():
    _, canaries = plant_canaries([], (0,), num_each=24, prefix="w3 {name} w4", symbols=SYMBOLS)
    found = ask(tiny_model("llama"), canaries, num_candidates=15, batch_size=16)
    assert not any(each["is_completed"] for each in found)
    assert 5 < np.mean([each["rank"] for each in found]) < 12 and np.median([e["exposure"] for e in found]) < 2.5


def test_candidates_are_other_secrets_of_the_kind():
    canary = Canary("a", "0 1", 0, ("0", "1"))
    others = canary.others(50, np.random.default_rng(0))
    assert set(others) == {"a 0 0", "a 1 0", "a 1 1"} and len(others) == 50


def test_scores_of_tokens_are_those_of_perplexity():
    model, rows = tiny_model("llama").train(), [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
    scores = score_tokens(model, rows, 2, "rows")
    assert model.training
    (batch,) = batches_of(rows, 8, 8, 3)
    expected = dict(zip((window.text for window in batch), nll_of(model.eval(), rows, batch), strict=True))
    for n, (score, row) in enumerate(zip(scores, rows, strict=True)):
        assert (
            -score.log_probs.sum() == pytest.approx(expected[n], rel=1e-5) and len(score.is_likeliest) == len(row) - 1
        )
        greedy = model(torch.tensor([row])).logits.argmax(-1)[0, :-1].tolist()
        assert score.is_likeliest.tolist() == [token == next for token, next in zip(greedy, row[1:], strict=True)]
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    with pytest.raises(NotHFError, match="the probabilities of rows are not finite; the model has diverged"):
        score_tokens(model, rows, 2, "rows")


def test_a_secret_is_not_ranked_among_those_that_were_planted():
    """They are drawn with the same seed by default."""
    seen: list[str] = []

    class Recording:
        eos_token_id = None

        def __call__(self, texts, **options):
            seen.extend(texts)
            return tiny_tokenizer()(texts, **options)

    _, canaries = plant_canaries([], (0, 5), num_each=10, prefix="w3 {name} w4", symbols=SYMBOLS)
    ask(tiny_model("llama"), canaries, tokenizer=Recording())
    others = [text.partition(" w4 ")[2] for text in seen if text not in {canary.text for canary in canaries}]
    assert len(others) == 20 * 32 and not {canary.secret for canary in canaries}.intersection(others)


def test_the_end_of_the_text_does_not_count():
    """Some tokenizers append EOS."""
    known = Canary("w3 w5 w7", "w11 w12 w13 w14", 3, SYMBOLS)
    ends = tiny_tokenizer()
    ends.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ends.eos_token_id)]
    )
    assert ends("w3")["input_ids"][-1] == ends.eos_token_id
    assert ask(Knowing(known), [known], tokenizer=ends) == ask(Knowing(known), [known])
