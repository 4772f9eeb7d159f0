"""What a donor's `config.json` may say, and what becomes of the rest."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from not_hf import CorruptDonorError, DonorConfig, DonorModel, NotHFError, TransplantedForCausalLM, check_compatibility
from not_hf.donor.loading import refuse
from not_hf.limits import MAX_CONFIG, MAX_DEPTH, MAX_LAYERS
from testing.commands import is_one_line
from testing.donors import edit_json, same
from testing.models import tiny_model
from testing.shapes import ARCHITECTURES, broadly


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    DonorModel.from_base(tiny_model("llama"), (1, 3), domain="Bible").save_pretrained(folder)
    return folder


@pytest.fixture
def edited(sound, tmp_path):
    """A copy of the sound donor with other values in its config; `a__b` is key b of a."""

    def edit(**values) -> Path:
        folder = Path(shutil.copytree(sound, tmp_path / "donor"))
        edit_json(folder / "config.json", **values)
        return folder

    return edit


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("implementation", ["someone/some-kernel", "flex_attention", {"": "someone/some-kernel"}, 3])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_donor_does_not_choose_how_attention_is_computed(key, implementation, edited, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)  # an import of it fails
    keys = (key, f"base_config__{key}", f"organ_config__{key}")
    folder = edited(**dict.fromkeys(keys, implementation))
    base = tiny_model("llama")
    assert check_compatibility(folder, base) == []
    donor = DonorModel.from_pretrained(folder)
    assert donor.config._attn_implementation == donor.organ.config._attn_implementation == "sdpa"
    model = TransplantedForCausalLM.from_pretrained(base, folder)
    assert model.config._attn_implementation == "sdpa"


def test_the_caller_still_chooses_it(sound, edited):
    donor = DonorModel.from_pretrained(sound, attn_implementation="eager")
    assert donor.organ.config._attn_implementation == "eager"
    folder = edited(attn_implementation="flex_attention")
    assert AutoConfig.from_pretrained(folder, attn_implementation="eager")._attn_implementation == "eager"


@pytest.mark.parametrize("quantization", [{"quant_method": "fp8"}, 3, {"quant_method": "x"}])
def test_a_donor_does_not_choose_a_quantization(quantization, sound, edited):
    keys = ("quantization_config", "base_config__quantization_config", "organ_config__quantization_config")
    folder = edited(**dict.fromkeys(keys, quantization))
    assert same(DonorModel.from_pretrained(folder), DonorModel.from_pretrained(sound))
    assert check_compatibility(folder, tiny_model("llama")) == []


IGNORED = {
    "native_config": {},
    "to_diff_dict": 3,
    "to_dict": None,
    "check": "x",
    "configuration_files": ["a.json"],
    "transformers_weights": "model.bin",
    "_heterogeneity_spec": 3,
    "auto_map": {"AutoConfig": "code.Config"},
    "__class__": "x",
    "num_labels": 10**9,
    "per_layer_config": {"0": {"x": 1}},
    "of_a_later_release": {"depth": 3},
}


@pytest.mark.parametrize("key", IGNORED)
def test_an_unknown_key_is_ignored_with_a_warning_and_not_saved(key, sound, edited, tmp_path, caplog):
    folder = edited(**{key: IGNORED[key]})
    with caplog.at_level(logging.WARNING, "not_hf"):
        donor = DonorModel.from_pretrained(folder)
    if key != "configuration_files":  # transformers' own
        assert repr(key) in caplog.text
    donor.save_pretrained(tmp_path / "again")
    saved, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "again", sound))
    assert saved == before
    assert same(donor, DonorModel.from_pretrained(sound))


@pytest.mark.parametrize("which", ["base_config", "organ_config"])
def test_a_native_config_hides_no_method(which, sound, edited):
    keys = ("to_dict", "to_diff_dict", "get_text_config", "attribute_map", "_heterogeneity_spec", "auto_map")
    folder = edited(**{f"{which}__{key}": 3 for key in keys})
    assert check_compatibility(folder, tiny_model("llama")) == []
    assert same(DonorModel.from_pretrained(folder), DonorModel.from_pretrained(sound))


WRONG = {
    "datasets": ("me/kjv", 3, [1], {"a": 1}),
    "metrics": ([1], "x", 3),
    "tokens_seen": ("many", 1.5, True),
    "domain": (3, ["a"]),
    "license": (3, [3], {}),
    "base_model_name_or_path": (3, ["a"]),
    "base_revision": (3,),
    "base_subfolder": (3,),
    "not_hf_version": (3,),
    "fingerprint": (3,),
    "position": (float("-inf"), "1", 1.0, True),
    "layers": ("4-7", [1, "a"], [True, 3]),
    "scale": (10**400, "1", [1], True),
    "dtype": ("x", "nn", 3, {"a": "b"}),
    "architectures": (3,),
    "organ_config__num_hidden_layers": ("2", 2.0, None, -1, 0, 10**9),
    "base_config__num_hidden_layers": ("4", None, 10**9, MAX_LAYERS + 1),
    "base_config__layer_types": (3, "x", [3] * 4),
    "base_config__rope_parameters": (3, [3], {"rope_type": 3}, {"rope_type": "x"}),
    "base_config__model_type": ("not_donor", "", 3, "x" * 1000),
    "organ_config__hidden_size": (0, -1, 10**30),
    "metrics__loss": (10**400,),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_wrong_value_is_one_line(key, value, edited):
    if key == "metrics__loss":
        key, value = "metrics", {"loss": value}
    folder = edited(**{key: value})
    for read in (
        lambda: DonorModel.from_pretrained(folder),
        lambda: refuse("donor", check_compatibility(folder, tiny_model("llama"))),
        lambda: AutoModelForCausalLM.from_pretrained(folder),
    ):
        with pytest.raises(NotHFError) as raised:
            read()
        assert is_one_line(raised.value)


@pytest.mark.parametrize("place", ["root", "domain", "metrics", "base_config__extra"])
def test_nesting_is_bounded(place, edited):
    folder = edited(**{place: {"a": nested(300)} if place == "metrics" else nested(300)})
    for read in (DonorModel.from_pretrained, DonorConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(CorruptDonorError, match=f"nested more than {MAX_DEPTH} deep"):
            read(folder)


def test_a_file_that_is_only_brackets_is_refused(edited):
    folder = edited()
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CorruptDonorError, match="nested more than"):
        DonorModel.from_pretrained(folder)


def test_size_is_bounded(edited):
    folder = edited(domain="x" * MAX_CONFIG)
    with pytest.raises(CorruptDonorError, match=r"config\.json has 1,\d+,\d+ bytes; it must have at most 1,048,576"):
        DonorModel.from_pretrained(folder)


def test_half_a_character_is_refused(edited):
    with pytest.raises(CorruptDonorError, match="not valid Unicode"):
        DonorModel.from_pretrained(edited(domain="\ud800"))


@broadly(ARCHITECTURES)
def test_every_native_config_comes_back_as_it_was_cut(model_type, tmp_path):
    base = tiny_model(model_type)
    DonorModel.from_base(base, (0, 2)).config.save_pretrained(tmp_path)
    again = DonorConfig.from_pretrained(tmp_path)
    native = again.native_config("base_config").to_dict()
    for key, value in base.config.to_dict().items():
        if key not in ("architectures", "id2label", "label2id", "_name_or_path", "dtype"):
            assert native[key] == value, key


def test_many_layers_in_a_small_file_are_refused_before_they_are_built(edited):
    folder = edited(base_config__num_hidden_layers=20_000)
    with pytest.raises(CorruptDonorError, match=f"num_hidden_layers 20000; it must be at most {MAX_LAYERS}"):
        DonorModel.from_pretrained(folder)
    config = LlamaConfig(num_hidden_layers=MAX_LAYERS + 1)  # of one's own, nothing is refused
    assert config.num_hidden_layers > MAX_LAYERS


def test_wide_layers_with_small_files_are_refused_before_they_are_allocated(edited, monkeypatch):
    keys = ("base_config__intermediate_size", "organ_config__intermediate_size")
    folder = edited(**dict.fromkeys(keys, 3_000_000))
    monkeypatch.setattr(torch, "empty_like", None)  # what transformers allocates with
    with pytest.raises(CorruptDonorError, match=r"describes layers of 576,.* values, far more than the files hold"):
        DonorModel.from_pretrained(folder)
