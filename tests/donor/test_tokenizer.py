"""The tokenizer of a local base goes into the donor's folder, unless it would run code."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from not_hf import DonorModel, TransplantedForCausalLM, compose
from testing.models import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path) -> Path:
    """A base whose tokenizer has code of its own; running it would leave a file."""
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = {
        **json.loads(path.read_text()),
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
    }
    path.write_text(json.dumps(values))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    return folder


def test_a_tokenizer_with_code_is_left_out_with_a_warning_and_no_question(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked"))
    DonorModel.from_base(base, (1, 3)).save_pretrained(tmp_path / "donor")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "donor").glob("tokenizer*"))
    assert f"tokenizer of {base} has code of its own" in caplog.text and "trust_remote_code=True" in caplog.text


def test_a_processor_whose_packages_are_missing_is_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    """Pixtral's needs torchvision in older releases of transformers, which the organ does not."""

    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError("PixtralProcessor requires the Torchvision library")

    tiny_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.setattr("not_hf.donor.tokenizer.AutoTokenizer.from_pretrained", missing)
    DonorModel.from_base(tmp_path / "base", (1, 3)).save_pretrained(tmp_path / "donor")
    assert f"the processor of {tmp_path / 'base'} is not saved with the donor: PixtralProcessor" in caplog.text


def test_that_of_a_base_in_a_subfolder_is_saved(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "root" / "sub")
    tiny_tokenizer().save_pretrained(tmp_path / "root" / "sub")
    donor = DonorModel.from_base(tmp_path / "root", (1, 3), subfolder="sub")
    donor.save_pretrained(tmp_path / "donor")
    compose([tmp_path / "donor"]).save_pretrained(tmp_path / "composed")
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "donor")
    model.load_donor(donor, "other")
    model.save_pretrained(tmp_path / "saved")
    for name in ("donor", "composed", "saved"):
        assert (tmp_path / name / "tokenizer_config.json").exists()


def test_one_that_may_be_of_the_base_of_before_is_kept_with_a_warning(tmp_path, caplog):
    """It may as well be the user's own."""
    for name in ("a", "b"):
        tiny_model("llama").save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    first, second = (DonorModel.from_base(tmp_path / name, (1, 3)) for name in ("a", "b"))
    first.save_pretrained(tmp_path / "donor")
    first.save_pretrained(tmp_path / "donor")
    assert "tokenizer" not in caplog.text
    second.save_pretrained(tmp_path / "donor")
    assert f"was of another base, {tmp_path / 'a'}; if it is the tokenizer of that base, delete" in caplog.text


def test_the_tokenizer_of_the_base_is_not_taken_for_one_that_has_the_tokens_of_the_donor(tmp_path, caplog):
    base, folder = tmp_path / "base", tmp_path / "donor"
    tiny_model("llama").save_pretrained(base)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(base)
    for last in (len(tokenizer) - 1, len(tokenizer)):
        donor = DonorModel.from_base(tiny_model("llama"), (1, 3), trainable_token_indices={"embed_tokens": [5]})
        donor.config.base_model_name_or_path, donor.config.trainable_token_indices = (
            str(base),
            {"embed_tokens": [last]},
        )
        donor.save_pretrained(folder / str(last))
        AutoTokenizer.from_pretrained(folder / str(last))
        lacks = last == len(tokenizer)
        assert (folder / str(last) / "tokenizer.json").exists() is not lacks
        assert ("rows for tokens that the tokenizer of its base" in caplog.text) is lacks
