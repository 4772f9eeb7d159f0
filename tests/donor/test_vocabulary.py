"""Recipients with other tokens than the organ's: they keep what they have, and differences are told in a warning."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from not_hf import DonorConfig, DonorModel, TransplantedForCausalLM, check_compatibility
from testing.donors import organ, same
from testing.models import logits, tiny_model, tiny_tokenizer
from testing.shapes import VOCAB

T = TransplantedForCausalLM.from_pretrained
MORE = VOCAB + 5


def grow(model: PreTrainedModel, size: int = MORE) -> PreTrainedModel:
    """Resize the embeddings; transformers draws the new rows at random."""
    torch.manual_seed(7)
    model.resize_token_embeddings(size)
    return model


@pytest.fixture
def ids(token_ids: torch.Tensor) -> torch.Tensor:
    """A prompt with added tokens in it, `(batch=2, seq=9)`."""
    ids = token_ids.clone()
    ids[:, 3] = MORE - 1
    return ids


# What the recipient has of its own survives


@pytest.mark.parametrize("when", ["before", "active", "disabled", "two", "parked"])
@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        pytest.param("llama", False, id="llama-untied"),
        pytest.param("gpt2", True, id="gpt2-tied"),
        pytest.param("llama", True, id="llama-tied", marks=pytest.mark.slow),
        pytest.param("gpt2", False, id="gpt2-untied", marks=pytest.mark.slow),
        pytest.param("opt", False, id="opt-untied"),
        pytest.param("opt", True, id="opt-tied"),
    ],
)
def test_resized_embeddings_survive_everything(model_type, tied, when, ids, tmp_path):
    def fresh() -> PreTrainedModel:
        return tiny_model(model_type, tie_word_embeddings=tied)

    donor, native = organ(fresh(), 1), grow(fresh())  # what unloading must give back
    flags = {name: parameter.requires_grad for name, parameter in native.named_parameters()}
    model = T(grow(fresh()) if when == "before" else fresh(), donor)
    if when in ("two", "parked"):
        model.load_donor(donor, "second", position=0)
    if when == "parked":
        model.set_donor("second")
    if when == "disabled":
        with model.disable_donors():
            grow(model)
    elif when != "before":
        grow(model)

    expected = T(copy.deepcopy(native), donor)
    if when in ("two", "parked"):
        expected.load_donor(donor, "second", position=0)
    expected.set_donor(model.active_donors)
    assert torch.equal(logits(model, ids), logits(expected, ids))
    with model.disable_donors():
        assert torch.equal(logits(model, ids), logits(native, ids))
    assert model.config.vocab_size == model.base_config.vocab_size == MORE

    model.save_pretrained(tmp_path / "organ")
    again = T(copy.deepcopy(native), tmp_path / "organ")
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.load_donor(donor, "third", position=1)
    again.delete_donor("third")
    assert torch.equal(logits(again, ids), logits(model, ids))

    unloaded = again.unload()
    assert same(unloaded, native) and unloaded.config.to_dict() == native.config.to_dict()
    assert {name: parameter.requires_grad for name, parameter in unloaded.named_parameters()} == flags

    after = logits(model, ids)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.vocab_size == MORE
    for each in (merged, loaded):
        assert torch.equal(logits(each, ids), after)
        assert (each.get_input_embeddings().weight is each.get_output_embeddings().weight) == tied


def test_a_tokenizer_with_added_tokens_comes_along(base_folder, ids, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens([f"<added{n}>" for n in range(MORE - VOCAB)])
    grow(tiny_model("llama")).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = T(tmp_path / "base", organ(base_folder("llama"), 1))
    model.save_pretrained(tmp_path / "organ")
    for donor in (tmp_path / "organ", tmp_path / "base"):
        loaded = AutoTokenizer.from_pretrained(donor)
        assert loaded("w5 <added4>").input_ids == [5, MORE - 1] and len(loaded) == MORE
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "organ")
    assert torch.equal(logits(again, ids), logits(model, ids))


# Differences are told, once, in one line


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said about vocabularies since the last call."""
    found = [record.getMessage() for record in caplog.records if "vocabulary" in record.getMessage()]
    assert all(record.levelno == logging.WARNING for record in caplog.records if "vocabulary" in record.getMessage())
    caplog.clear()
    return found


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"vocab_size": VOCAB + 1}, "vocab_size is 97 in the recipient, 96 in the base"),
        ({"vocab_size": 128}, "vocab_size is 128 in the recipient, 96 in the base"),
        ({"vocab_size": 90}, "vocab_size is 90 in the recipient, 96 in the base"),
        ({"eos_token_id": 5}, "eos_token_id is 5 in the recipient, 2 in the base"),
        ({"eos_token_id": [5, 6]}, "eos_token_id is [5, 6] in the recipient, 2 in the base"),
        (
            {"bos_token_id": 7, "vocab_size": 100},
            "vocab_size is 100 in the recipient, 96 in the base; bos_token_id is 7 in the recipient, 1 in the base",
        ),
    ],
)
def test_another_vocabulary_is_told(overrides, told, caplog, token_ids):
    model = T(tiny_model("llama", **overrides), organ(tiny_model("llama"), 1))
    (line,) = warnings(caplog)
    assert line == f"organ 'default' was cut from a model with another vocabulary: {told}"
    logits(model, token_ids % 90)
    model.load_donor(organ(tiny_model("llama"), 2), "second")
    (line,) = warnings(caplog)
    assert "organ 'second'" in line and told in line
    with model.disable_donors():
        model.set_donor("second")
    model.delete_donor("default")
    assert warnings(caplog) == []  # once per load


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"eos_token_id": [2, 5]},
        {"eos_token_id": None},
        {"pad_token_id": 2},
    ],
)
def test_what_is_no_other_vocabulary_is_not_told(overrides, caplog):
    T(tiny_model("llama", **overrides), organ(tiny_model("llama"), 1))
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("size", "other", "is_padding"),
    [
        (50257, 50304, True),  # GPT-2, as many train it
        (32001, 32064, True),
        (32000, 32001, False),  # one token more
        (32000, 32064, False),  # added, then padded: 32000 needed no padding
        (32000, 32768, False),
        (96, 128, False),  # rounded up, but by a third
    ],
)
@pytest.mark.parametrize("padded", ["recipient", "donor"])
def test_padding_is_told_apart(size, other, is_padding, padded, caplog):
    small, large = ({"hidden_size": 8, "head_dim": 2, "vocab_size": each} for each in (size, other))
    recipient, base = (large, small) if padded == "recipient" else (small, large)
    T(tiny_model("llama", **recipient), DonorModel.from_base(tiny_model("llama", **base), layers=(1, 2)))
    assert warnings(caplog) == [] if is_padding else len(warnings(caplog)) == 1


def test_a_recipient_that_grew_meanwhile_is_told(caplog):
    model = grow(T(tiny_model("llama"), organ(tiny_model("llama"), 1)))
    assert warnings(caplog) == []
    model.load_donor(organ(tiny_model("llama"), 2), "second")
    (line,) = warnings(caplog)
    assert f"vocab_size is {MORE} in the recipient, {VOCAB} in the base" in line


def test_an_organ_tells_the_vocabulary_it_was_last_used_with(base_folder, tmp_path, caplog):
    """Cut from one model and trained in another, whose name it carries from then on."""
    grow(tiny_model("llama", eos_token_id=9)).save_pretrained(tmp_path / "other")
    model = T(tmp_path / "other", organ(base_folder("llama"), 1), is_trainable=True)
    assert len(warnings(caplog)) == 1
    model.save_pretrained(tmp_path / "organ")
    config = DonorConfig.from_pretrained(tmp_path / "organ")
    for which in ("base_config", "organ_config"):
        assert (config.native_config(which).vocab_size, config.native_config(which).eos_token_id) == (MORE, 9)
    T(tmp_path / "organ")
    assert warnings(caplog) == []
    T(base_folder("llama"), tmp_path / "organ")
    (line,) = warnings(caplog)
    assert (
        f"vocab_size is {VOCAB} in the recipient, {MORE} in the base" in line
        and "eos_token_id is 2 in the recipient, 9 in the base" in line
    )


# Tokenizers, where they are at hand


def other_tokenizer(kind: str = "WordLevel") -> PreTrainedTokenizerFast:
    """As many tokens as the tiny one has, of which the first three are the same."""
    words = ["<pad>", "<s>", "</s>", *(f"x{n}" for n in range(3, VOCAB))]
    if kind == "Unigram":
        model = models.Unigram([(word, -1.0) for word in words], unk_id=0)
    else:
        model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


TOLD = f"the recipient's tokenizer lacks or renumbers {VOCAB - 3} of {VOCAB} tokens and has {VOCAB - 3} more"


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
@pytest.mark.parametrize("base", ["here", "gone"])
def test_another_tokenizer_of_the_same_size_is_told(kind, base, tmp_path, caplog):
    """The organ's is that of its base, or the one that came along with the organ."""
    for name, tokenizer in (("base", tiny_tokenizer()), ("other", other_tokenizer(kind)), ("same", tiny_tokenizer())):
        tiny_model("llama").save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    organ(tmp_path / "base", 1).save_pretrained(tmp_path / "organ")
    if base == "gone":
        (tmp_path / "base").rename(tmp_path / "gone")
    T(tmp_path / "other", tmp_path / "organ")
    (line,) = warnings(caplog)
    assert line.endswith(TOLD)
    T(tmp_path / "same", tmp_path / "organ")
    assert warnings(caplog) == []


def test_a_tokenizer_with_more_tokens_is_told(base_folder, tmp_path, caplog):
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base_folder("llama"))
    tokenizer.add_tokens(["<one>", "<two>", "<three>"])
    tokenizer.save_pretrained(tmp_path)
    T(tmp_path, organ(base_folder("llama"), 1))
    (line,) = warnings(caplog)
    assert line.endswith("the recipient's tokenizer has 3 more tokens")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": {"vocab": 3}}', b"\xff"])
def test_a_tokenizer_that_cannot_be_read_is_no_matter(content, base_folder, tmp_path, caplog):
    tiny_model("llama").save_pretrained(tmp_path)
    Path(tmp_path, "tokenizer.json").write_bytes(content)
    T(tmp_path, organ(base_folder("llama"), 1))
    assert warnings(caplog) == []


def test_tokenizers_in_a_cache_of_ones_own_are_compared(base_repo, tmp_path):
    base, other = base_repo("llama"), "me/other-tokens-elsewhere"
    tiny_model("llama").push_to_hub(other)
    other_tokenizer().push_to_hub(other)
    donor, cache = organ(base, 1), {"cache_dir": tmp_path}
    assert TOLD not in check_compatibility(donor, other, **cache).differences
    hf_hub_download(base, "tokenizer.json", revision=donor.config.base_revision, **cache)
    hf_hub_download(other, "tokenizer.json", **cache)
    assert TOLD in check_compatibility(donor, other, **cache).differences
    assert TOLD not in check_compatibility(donor, other).differences


@pytest.mark.slow
def test_tokenizers_on_the_hub_are_compared_but_not_fetched(hub, base_repo, caplog):
    base, other = base_repo("llama"), "me/other-tokens"
    tiny_model("llama").push_to_hub(other)
    other_tokenizer().push_to_hub(other)
    donor = organ(base, 1)
    donor.push_to_hub("me/organ-of-tokens")
    hf_hub_download(base, "tokenizer.json", revision=donor.config.base_revision)
    hub.requests.clear()
    T(other, "me/organ-of-tokens")
    assert warnings(caplog) == []
    assert not [record for record in hub.requests if "tokenizer" in record.path]
    hf_hub_download(other, "tokenizer.json")
    T(other, "me/organ-of-tokens")
    (line,) = warnings(caplog)
    assert line.endswith(TOLD)
    T("me/organ-of-tokens")
    assert warnings(caplog) == []
