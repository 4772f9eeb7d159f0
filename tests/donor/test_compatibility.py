"""An organ that was trained in one recipient works in another fine-tune of the same architecture."""

from __future__ import annotations

import contextlib
import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM, check_compatibility, check_donor
from testing import EXAMPLES
from testing.commands import invoke
from testing.donors import organ, tiny_organ, transplanted
from testing.models import logits, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def fine_tunes(tmp_path) -> tuple[Path, Path]:
    """Two models of one architecture and vocabulary with other weights."""
    for seed, name in enumerate(("first", "second")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path / "first", tmp_path / "second"


@pytest.mark.slow
def test_trained_in_one_and_loaded_by_id_into_another(fine_tunes, token_ids, tmp_path, hub):
    first, second = fine_tunes
    blocks = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (8, 16))]
    donor = DonorModel.from_base(first, (1, 3), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(first, donor, is_trainable=True)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=4, report_to="none", use_cpu=True, save_strategy="no", learning_rate=1e-2
    )
    Trainer(model, arguments, train_dataset=blocks, data_collator=default_data_collator).train()
    model.push_to_hub("me/two-recipients")

    found = check_compatibility("me/two-recipients", second)
    assert found == [] and found.differences == [f"the organ was last used in {first}, not in {second}"]
    there = TransplantedForCausalLM.from_pretrained(second, "me/two-recipients")
    by_hand = AutoModelForCausalLM.from_pretrained(second)
    for n in (1, 2):
        by_hand.model.layers[n].load_state_dict(model.model.layers[n].state_dict())
    assert torch.equal(logits(there, token_ids), logits(by_hand, token_ids))
    with there.disable_donors():
        assert torch.equal(logits(there, token_ids), logits(AutoModelForCausalLM.from_pretrained(second), token_ids))
    assert HfApi().repo_exists("me/two-recipients")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"rms_norm_eps": 1e-4}, "rms_norm_eps is 0.0001 in the recipient, 1e-06 in the base"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' in the recipient, 'silu' in the base"),
        ({"vocab_size": 128}, "vocab_size is 128 in the recipient, 96 in the base"),
        ({"eos_token_id": 7}, "eos_token_id is 7 in the recipient, 2 in the base"),
    ],
)
def test_what_differs_is_told_and_keeps_nothing_out(other, difference, token_ids, caplog):
    recipient = tiny_model("llama", **other)
    donor = organ(tiny_model("llama"), 1)
    found = check_compatibility(donor, recipient)
    assert found == [] and difference in found.differences
    model = TransplantedForCausalLM.from_pretrained(recipient, donor)
    assert logits(model, token_ids).isfinite().all() and "organ 'default' was" in caplog.text


def test_a_rope_of_another_base_keeps_an_organ_out():
    """The recipient computes its rotary embedding once for all layers, so an organ cannot have another."""
    recipient = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    found = check_compatibility(organ(tiny_model("llama"), 1), recipient)
    assert "rope_parameters" in found[0] and found.differences == []


def test_the_command_line_tells_both(fine_tunes, tmp_path):
    first, second = fine_tunes
    organ(first, 1).save_pretrained(tmp_path / "organ")
    told = invoke("check", tmp_path / "organ", second)
    assert told.exit_code == 0 and "fits" in told.stdout and "differs: the organ was last used in" in told.stdout
    found = json.loads(invoke("check", tmp_path / "organ", second, "--json").stdout)
    assert found["compatible"] is True and len(found["differences"]) == 1


@pytest.mark.slow
def test_the_example(fine_tunes, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 w7\n" * 60)
    first, second = map(str, fine_tunes)
    command = ["--first", first, "--second", second, "--text", str(tmp_path / "text.txt"), "--layers", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["two_recipients.py", *command, "--steps", "2", "--block-length", "16"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "two_recipients.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "the organ was last used in" in printed and printed.count("perplexity") == 2


def test_compatibility_counts_the_own_layers_of_a_transplanted_recipient():
    a = tiny_organ(1, layers=(1, 2))
    model = transplanted(("b", tiny_organ(2), {}))
    assert model.config.num_hidden_layers == 6 and model.base_config.num_hidden_layers == 4
    assert check_compatibility(a, model, position=4) == []
    assert "between 0 and 4" in check_compatibility(a, model, position=5)[0]


def test_a_revision_and_a_subfolder_are_the_donors(base_repo, base_folder, hub, tmp_path):
    """The recipient has neither."""
    donor = DonorModel.from_base(base_repo("llama"), (1, 3))
    donor.save_pretrained(tmp_path / "inner")
    assert check_compatibility(tmp_path, base_folder("llama"), subfolder="inner") == []
    donor.push_to_hub("me/tagged-organ")
    HfApi().create_tag("me/tagged-organ", tag="v1")
    tiny_config("llama", hidden_size=64).save_pretrained(tmp_path / "gone")
    HfApi().upload_folder(repo_id="me/tagged-organ", folder_path=tmp_path / "gone")
    assert check_compatibility("me/tagged-organ", base_repo("llama"), revision="v1") == []
    with pytest.raises(NotHFError, match="is not a donor: its config has model_type 'llama'"):
        check_compatibility("me/tagged-organ", base_repo("llama"))
    for where in ({"revision": "v1"}, {"subfolder": "inner"}):
        for given in (donor, donor.config):
            with pytest.raises(NotHFError, match="a donor in memory has no revision or subfolder; leave them out"):
                check_compatibility(given, base_repo("llama"), **where)


def test_unknown_arguments_are_refused(tmp_path):
    donor = tiny_organ(1)
    with pytest.raises(TypeError, match="unexpected arguments: donor_revision; expected are cache_dir"):
        check_compatibility(donor, tiny_model("llama"), donor_revision="v2")


def test_a_donor_in_the_place_of_the_recipient(tmp_path):
    donor = tiny_organ(1)
    with pytest.raises(NotHFError, match="the donor is a LlamaForCausalLM, not a DonorModel; name the donor first"):
        check_compatibility(tiny_model("llama"), donor)
    donor.save_pretrained(tmp_path)
    for recipient in (tmp_path, donor, DonorModel.from_pretrained(tmp_path).config):
        for check in (check_compatibility, check_donor):
            with pytest.raises(NotHFError, match=r" is a donor, not a recipient; name the donor first, then its base"):
                check(tmp_path, recipient)


@pytest.mark.slow
def test_modules_beside_the_layers_are_compared(caplog, tmp_path):
    """What would be refused or shared when the donor is loaded."""
    apart, tied = tiny_model("llama"), tiny_model("llama", tie_word_embeddings=True)
    both = DonorModel.from_base(apart, (1, 3), modules_to_save=["embed_tokens", "lm_head"])
    embeddings = DonorModel.from_base(tied, (1, 3), modules_to_save=["embed_tokens"])
    classes = tiny_config("llama", num_labels=3)
    classifier = DonorModel.from_base(
        AutoModelForSequenceClassification.from_config(classes), (1, 3), modules_to_save=["score"]
    )
    shared = "lm_head, and the donor holds one for each"
    only_here = "embed_tokens shares its weight with no module in the recipient, lm_head in the base"
    for n, (donor, recipient, problem, difference) in enumerate(
        (
            (both, tied, shared, None),
            (both, tied.config, shared, None),
            (both, apart, None, None),
            (embeddings, apart, None, only_here),
            (embeddings, tied.config, None, None),
            (classifier, apart, "the model has no module 'score' beside its layers", None),
            (classifier, apart.config, None, None),  # a classifier may be built of it
        )
    ):
        donor.save_pretrained(tmp_path / str(n))
        for found in (check_compatibility(donor, recipient), check_donor(tmp_path / str(n), recipient)):
            assert len(found) == bool(problem) and all(problem in each for each in found)
            assert (difference in found.differences) if difference else not found.differences
        if isinstance(recipient, PreTrainedModel):
            model = copy.deepcopy(recipient)
            with pytest.raises(NotHFError) if problem else contextlib.nullcontext():
                TransplantedForCausalLM.from_pretrained(model, donor)
            assert (only_here in caplog.text) == bool(difference)
            caplog.clear()


def test_organs_of_another_build_are_refused():
    """falcon reads at run time from the config which modules a layer has."""
    donor = DonorModel.from_base(tiny_model("falcon", parallel_attn=False), (1, 3))
    assert "have other modules than the donor's" in check_compatibility(donor, tiny_model("falcon"))[0]


def test_tables_of_positions_must_be_long_enough():
    donor = DonorModel.from_base(tiny_model("gpt_neo", max_position_embeddings=8), (1, 3))
    assert "attn.attention.bias" in check_compatibility(donor, tiny_model("gpt_neo"))[0]
