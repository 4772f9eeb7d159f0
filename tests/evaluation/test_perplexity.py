"""Perplexity against a loop by hand in float64, and against what a caller may not lose."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import evaluate
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

import not_hf
from not_hf import (
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
    UnsupportedArchitectureError,
    compare_perplexity,
)
from not_hf.evaluation.chat_perplexity import measure_chat
from not_hf.evaluation.perplexity import Perplexity, perplexity
from not_hf.evaluation.windows import encode
from testing.models import tiny_config, tiny_model
from testing.releases import since

CONTEXT = 32
# from one token to several windows
TEXTS = ["In", "the beginning was the word"] + [f"verse {i}" + " and the word" * (9 * i % 40) for i in range(10)]
KEYS = {"perplexities", "mean_perplexity", "perplexity", "num_tokens"}
KEYS |= {"nats_per_token", "bits_per_byte", "num_bytes", "confidence_interval"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's: BOS = EOS = 0, no pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=["<|end|>"], show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", model_max_length=CONTEXT
    )


@pytest.fixture(scope="module", params=["gpt2", "llama", pytest.param("opt", marks=pytest.mark.slow)])
def model(request):
    """Learned, rotary and mask-derived positions; initialized widely, so that every detail shows in the numbers."""
    torch.manual_seed(0)
    ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    if request.param == "gpt2":
        size = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
        return GPT2LMHeadModel(GPT2Config(**ids, **size)).eval()
    size = {"max_position_embeddings": CONTEXT, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**ids, **size, intermediate_size=32, initializer_range=0.3)).eval()
    return OPTForCausalLM(
        OPTConfig(**ids, **size, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=1, init_std=0.3)
    ).eval()


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    config = GPT2Config(
        vocab_size=64, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def by_hand(model, tokenizer, texts, *, max_length, stride, bos=True) -> tuple[list[float], float, int]:
    """Perplexity of each text, of all, and the number of tokens: one text, window and token at a time, in fp64."""
    model = copy.deepcopy(model).double()
    perplexities, total, num_tokens = [], 0.0, 0
    for text in texts:
        ids = [0] * bos + tokenizer(text, verbose=False)["input_ids"]
        nll, covered = [], 0
        for begin in range(0, len(ids), stride):
            window = ids[begin : begin + max_length]
            with torch.no_grad():
                logits = model(torch.tensor([window])).logits[0]  # (seq, vocab)
            for place in range(1, len(window)):
                if begin + place >= covered:
                    nll.append(-math.log(torch.softmax(logits[place - 1], 0)[window[place]]))
            covered = begin + len(window)
            if covered == len(ids):
                break
        perplexities.append(math.exp(sum(nll) / len(nll)))
        total, num_tokens = total + sum(nll), num_tokens + len(nll)
    return perplexities, math.exp(total / num_tokens), num_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "window",
    [{}, {"max_length": 16, "stride": 5}, {"max_length": 16, "stride": 15}, {"max_length": 16, "stride": 16}],
    ids=["default", "overlap", "one", "none"],
)
def test_numbers_are_those_by_hand(model, tokenizer, window):
    expected = {"max_length": CONTEXT, "stride": CONTEXT // 2} | window
    each, corpus, num_tokens = by_hand(model, tokenizer, TEXTS, **expected)
    lengths = [len(ids) for ids in tokenizer(TEXTS, verbose=False)["input_ids"]]
    assert max(lengths) > 2 * CONTEXT
    for batch_size in (1, 5, 16):
        result = perplexity.compute(
            predictions=TEXTS, model=model, tokenizer=tokenizer, batch_size=batch_size, **window
        )
        assert result.keys() == KEYS
        assert result["perplexities"] == pytest.approx(each, rel=1e-5)
        assert result["mean_perplexity"] == pytest.approx(sum(each) / len(each), rel=1e-5)
        assert result["perplexity"] == pytest.approx(corpus, rel=1e-5)
        assert result["num_tokens"] == num_tokens
    if expected["stride"] < expected["max_length"]:
        assert num_tokens == sum(lengths)  # every token once


def test_the_head_runs_where_tokens_are_scored(model, tokenizer, monkeypatch):
    head, seen = model.get_output_embeddings(), []
    run = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: (seen.append(hidden.shape[:2].numel()), run(hidden))[1])
    found = perplexity.compute(predictions=TEXTS[-1:], model=model, tokenizer=tokenizer, max_length=16, stride=4)
    assert found["num_tokens"] < sum(seen) < 1.5 * found["num_tokens"]  # four tokens of sixteen are scored


def test_without_start_token(gpt2, tokenizer):
    texts = TEXTS[1:]
    each, corpus, num_tokens = by_hand(gpt2, tokenizer, texts, max_length=CONTEXT, stride=16, bos=False)
    result = perplexity.compute(predictions=texts, model=gpt2, tokenizer=tokenizer, add_start_token=False)
    assert result["perplexities"] == pytest.approx(each, rel=1e-5)
    assert (result["perplexity"], result["num_tokens"]) == (pytest.approx(corpus, rel=1e-5), num_tokens)


MIXED = ["café crème 猫が 🙂 naïve\n\nword", "🙂 the word", "猫", "and  the\tword "]


@pytest.fixture(scope="module")
def all_bytes() -> PreTrainedTokenizerFast:
    """A tokenizer that knows every byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [3, 8])
def test_bits_per_byte_by_hand(all_bytes, bos, stride):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(all_bytes), n_positions=8, n_embd=16, n_layer=1, n_head=2))
    how = {"add_start_token": bos, "max_length": 8, "stride": stride}
    found = perplexity.compute(predictions=MIXED, model=model, tokenizer=all_bytes, **how)
    nats = found["nats_per_token"] * found["num_tokens"]
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["num_bytes"])
    scored = sum(len(text.encode()) for text in MIXED)
    if not bos:
        scored -= len("c") + 0 + 0 + len("an")  # of the emoji and the kanji, the first token has the first byte only
    if stride == 3:
        assert found["num_bytes"] == scored
    else:  # each later window skips a token
        assert 0 < found["num_bytes"] < scored


def test_bytes_of_tokens(all_bytes):
    for text in MIXED:
        ids, ends = (each[0] for each in encode([text], all_bytes, True))
        assert len(ids) == len(ends) and ends[0] == 0 and ends[-1] == len(text.encode()) and (np.diff(ends) >= 0).all()
        for end in ends:
            text.encode()[: int(end)].decode()  # never amid a character
    assert encode(["naïve word"], ByT5Tokenizer(), False)[1][0].tolist() == [*range(1, 12)]  # it tells no offsets


def test_intervals_hold_the_number_and_need_two_windows(gpt2, tokenizer):
    names = ["perplexity", "nats_per_token", "bits_per_byte"]
    how = {"predictions": TEXTS, "model": gpt2, "tokenizer": tokenizer}
    found, narrow = perplexity.compute(**how), perplexity.compute(**how, confidence_level=0.5)
    for name in names:
        low, high = found["confidence_interval"][name]
        assert low < found[name] < high and found["confidence_interval"][name].low == low
        assert low < narrow["confidence_interval"][name].low < narrow["confidence_interval"][name].high < high
    low, high = found["confidence_interval"]["nats_per_token"]
    assert found["confidence_interval"]["perplexity"] == (math.exp(low), math.exp(high))
    assert perplexity.compute(**how, seed=1)["confidence_interval"] != found["confidence_interval"]
    one = perplexity.compute(**how | {"predictions": TEXTS[:1]})
    assert one["confidence_interval"] == dict.fromkeys(names)


def test_results_are_saved_by_evaluate(gpt2, tokenizer, tmp_path):
    found = perplexity.compute(predictions=TEXTS, model=gpt2, tokenizer=tokenizer)
    evaluate.save(tmp_path / "found.json", **found, model="gpt2")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["confidence_interval"]["perplexity"] == list(found["confidence_interval"]["perplexity"])
    assert {key: saved[key] for key in KEYS - {"confidence_interval"}} == {
        key: found[key] for key in KEYS - {"confidence_interval"}
    }


def test_low_precision_logits_are_summed_in_float32(gpt2, tokenizer):
    half = copy.deepcopy(gpt2).bfloat16()
    seen = []
    handle = half.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
    result = perplexity.compute(predictions=TEXTS[:1], model=half, tokenizer=tokenizer)
    handle.remove()
    assert seen == [torch.bfloat16]
    ids = torch.tensor([[0, *tokenizer(TEXTS[0])["input_ids"]]])
    with torch.no_grad():
        log_probabilities = half(ids).logits[0].double().log_softmax(-1)
    nll = -sum(log_probabilities[i, ids[0, i + 1]] for i in range(ids.shape[1] - 1)) / (ids.shape[1] - 1)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)


def test_a_hopeless_model_is_infinitely_perplexed(gpt2, tokenizer):
    broken = copy.deepcopy(gpt2)
    broken.lm_head.weight.data *= 1e6
    assert perplexity.compute(predictions=TEXTS[1:2], model=broken, tokenizer=tokenizer)["perplexity"] == math.inf


def test_model_and_tokenizer_come_back_as_they_were(gpt2, tokenizer):
    model = copy.deepcopy(gpt2).train()
    model.transformer.h[0].eval()  # frozen part, as trainers leave it
    modes = [module.training for module in model.modules()]
    state = pickle.dumps(tokenizer)
    first = perplexity.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert pickle.dumps(tokenizer) == state
    assert tokenizer.pad_token is None
    assert first == perplexity.compute(predictions=TEXTS, model=gpt2, tokenizer=tokenizer)  # no dropout

    model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        perplexity.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert first == perplexity.compute(predictions=TEXTS, model=gpt2, tokenizer=tokenizer)  # no text left behind


def test_by_id_and_through_evaluate(gpt2, tokenizer, tmp_path):
    expected = perplexity.compute(predictions=TEXTS, model=gpt2, tokenizer=tokenizer)
    gpt2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert perplexity.compute(predictions=TEXTS, model_id=str(tmp_path), device="cpu") == expected
    assert perplexity.compute(predictions=TEXTS, model=tmp_path, tokenizer=tokenizer, device="cpu") == expected
    loaded = evaluate.load(str(Path(not_hf.__file__).parent / "evaluation" / "perplexity.py"))
    assert loaded.compute(predictions=TEXTS, model_id=str(tmp_path), device="cpu") == expected


@pytest.mark.slow
def test_donors_and_transplanted_models(gpt2, tokenizer, tmp_path):
    gpt2.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    donor = DonorModel.from_base(str(tmp_path / "base"), layers=(0, 1), init="identity")
    donor.save_pretrained(tmp_path / "donor")
    expected = perplexity.compute(predictions=TEXTS, model=gpt2, tokenizer=tokenizer)
    model = TransplantedForCausalLM.from_pretrained(str(tmp_path / "base"), donor)
    assert perplexity.compute(predictions=TEXTS, model=model, tokenizer=tokenizer) == expected
    assert perplexity.compute(predictions=TEXTS, model_id=str(tmp_path / "donor"), device="cpu") == expected


@since("datasets", "5.0", "its writer does not keep the order of `add` and `add_batch`")
def test_is_a_metric_without_cache_files(gpt2, tokenizer, tmp_path):
    assert isinstance(perplexity, evaluate.Metric)
    assert not_hf.perplexity is perplexity
    assert "stride" in perplexity.compute.__doc__
    metric = Perplexity(cache_dir=str(tmp_path))
    expected = metric.compute(predictions=TEXTS[:3], model=gpt2, tokenizer=tokenizer)
    metric.add(prediction=TEXTS[0])
    metric.add_batch(predictions=TEXTS[1:3])
    assert metric.compute(model=gpt2, tokenizer=tokenizer) == expected
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # so processes cannot get in each other's way


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": []}, "no texts to score"),
        ({"predictions": None}, "no texts to score"),
        ({"predictions": "a text"}, r"must be a list of texts, got a string; give predictions=\[text\]"),
        ({"predictions": ["a", None]}, "must be a list of str, got a NoneType"),
        ({"predictions": ["word", ""]}, "1 of 2 texts have no token to score, first: 1; remove empty texts"),
        ({"predictions": ["the"], "add_start_token": False}, "first: 0; remove them, or pass add_start_token=True"),
        ({"tokenizer": None}, "a live model needs its tokenizer"),
        ({"model": None}, "give either model="),
        ({"model_id": "gpt2"}, "give either model="),
        ({"device": "meta"}, "the model is on cpu, not meta"),
        ({"max_length": 1}, "max_length must be between 2 and 32, the model's context, got 1"),
        ({"max_length": 33}, "max_length must be between 2 and 32, the model's context, got 33"),
        ({"stride": 0}, "stride must be between 1 and 32, the max_length, got 0"),
        ({"stride": 33}, "stride must be between 1 and 32, the max_length, got 33"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"confidence_level": 95}, "confidence_level must be between 0 and 1, such as 0.95, got 95"),
    ],
)
def test_says_what_is_wrong(gpt2, tokenizer, change, message):
    with pytest.raises(NotHFError, match=message):
        perplexity.compute(**{"predictions": TEXTS, "model": gpt2, "tokenizer": tokenizer} | change)


def test_what_does_not_predict_the_next_token_is_refused(tokenizer, tmp_path):
    encoder = tiny_model("bert")
    encoder.save_pretrained(tmp_path)
    donor = DonorModel.from_base(encoder, layers=(1, 3))
    transplanted = TransplantedForMaskedLM.from_pretrained(copy.deepcopy(encoder), donor)
    headless = AutoModel.from_config(tiny_config("gpt2"))
    for model in (encoder, transplanted, headless, str(tmp_path)):
        with pytest.raises(UnsupportedArchitectureError, match="does not predict the next token; use a causal LM"):
            perplexity.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    with pytest.raises(UnsupportedArchitectureError, match="BertForMaskedLM does not predict the next token"):
        compare_perplexity(None, transplanted, TEXTS, tokenizer=tokenizer)


def test_a_string_is_no_batch_of_letters():
    with pytest.raises(NotHFError, match="predictions must be a list of texts, got a string"):
        Perplexity().add_batch(predictions="a text")


def test_an_organ_alone_writes_no_text(tokenizer):
    with pytest.raises(NotHFError, match="an organ alone, which writes no text; put it into a recipient"):
        perplexity.compute(
            predictions=TEXTS, model=DonorModel.from_base(tiny_model("llama"), (1, 3)), tokenizer=tokenizer
        )


def test_the_perplexity_of_a_chat_may_be_infinite():
    base = tiny_model("llama")
    base.lm_head.weight.data.mul_(3e4)
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3), init="identity"))
    found = measure_chat(model, [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}])
    assert found == {when: {"perplexity": math.inf, "num_tokens": 2} for when in ("before", "after")}


def test_asks_for_a_start_token(gpt2, tokenizer):
    no_bos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(NotHFError, match="no BOS token; pass add_start_token=False"):
        perplexity.compute(predictions=TEXTS, model=gpt2, tokenizer=no_bos)


def test_progress_counts_tokens(gpt2, tokenizer, monkeypatch):
    class Bar:
        """A progress bar that remembers what it is told."""

        steps: ClassVar[list[int]] = []

        def __init__(self, total: int, **options: Any) -> None:
            Bar.total = total

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, n: int) -> None:
            self.steps.append(n)

    monkeypatch.setattr(evaluate.logging, "tqdm", Bar)
    found = perplexity.compute(predictions=TEXTS, model=gpt2, tokenizer=tokenizer, batch_size=2)
    assert sum(Bar.steps) == Bar.total == found["num_tokens"] and len(Bar.steps) > 1
