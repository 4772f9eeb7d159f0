"""Models with organs are saved as what was put into them: one organ, or a composition."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Trainer, TrainingArguments

from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    reference_model,
)
from testing import tree
from testing.donors import tiny_organ, transplanted
from testing.models import logits, tiny_model
from testing.training import rows

A, B, C = tiny_organ(1, layers=(1, 2)), tiny_organ(2, layers=(0, 2)), tiny_organ(3, layers=(1, 2))


@pytest.mark.slow
def test_shards_of_an_organ_load_one_by_one(token_ids, tmp_path):
    """As `Trainer` does on resuming from a sharded checkpoint."""
    model = transplanted(("b", B, {}))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    expected = logits(model, token_ids)
    other = transplanted(("b", DonorModel.from_base(tiny_model("llama"), (0, 2)), {}))
    for shard in shards:
        other.load_state_dict(load_file(shard), strict=False)
    assert torch.equal(logits(other, token_ids), expected)
    with pytest.raises(CorruptDonorError, match="missing"):
        other.load_state_dict(load_file(shards[0]))


def test_a_checkpoint_of_organs_that_the_model_lacks_is_not_passed_over(token_ids):
    model = transplanted(("a", A, {}))
    expected, tensors = logits(model, token_ids), C.state_dict()
    both = {f"{name}.{key}": tensor for name in ("a", "law") for key, tensor in tensors.items()}
    with pytest.raises(NotHFError, match="the checkpoint has organs that the model lacks: law; load them first"):
        model.load_state_dict(both, strict=False)
    assert torch.equal(logits(model, token_ids), expected)


def test_an_organ_is_saved_in_its_own_dtype_or_as_asked_for(tmp_path):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama").bfloat16(), A)
    for asked, dtype in ((None, torch.bfloat16), (torch.float16, torch.float16), ("bfloat16", torch.bfloat16)):
        model.save_pretrained(tmp_path, dtype=asked)
        assert DonorConfig.from_pretrained(tmp_path).dtype == dtype
        assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    with pytest.raises(NotHFError, match="dtype must be a floating-point one or its name"):
        model.save_pretrained(tmp_path, dtype="fp16")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_state_dict_of_other_names_is_refused_and_nothing_written(prefix, tmp_path):
    for model in (transplanted(("a", A, {})), DonorModel.from_base(tiny_model("llama"), (1, 2))):
        wrapped = {prefix + key: tensor for key, tensor in model.state_dict().items()}
        with pytest.raises(NotHFError, match=r"^state_dict .* the unwrapped (model|donor), or leave it out$"):
            model.save_pretrained(tmp_path, state_dict=wrapped)
        assert not any(tmp_path.iterdir())


def test_a_variant_which_no_model_would_load_is_refused(tmp_path):
    with pytest.raises(NotHFError, match=r"variant='fp16' would not be found; leave it out, .*dtype=torch.float16"):
        transplanted(("a", A, {})).save_pretrained(tmp_path / "out", variant="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_card_says_where_its_numbers_were_measured(tmp_path, base_folder):
    metrics, elsewhere = (
        {"perplexity": {"before": 30.0, "after": 12.5}},
        "Measured at position 3, mode insert, scale 1.0:",
    )
    donor = tiny_organ(1)
    donor.config.metrics = metrics
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), donor, donor_name="a", position=1)
    model.set_donor_scale("a", 0.25)
    for folder in (tmp_path / "moved", tmp_path / "again"):
        model.save_pretrained(folder)
        card = ModelCard.load(folder / "README.md")
        assert "| perplexity | 30 | 12.5 |" in card.text and elsewhere in card.text and not card.data.eval_results
        model = TransplantedForCausalLM.from_pretrained(folder, position=0)
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), tmp_path / "again", position=3)
    model.set_donor_scale("default", 1.0)
    model.save_pretrained(tmp_path / "back")
    model.set_donor_scale("default", 0.5)
    model.donor_config["default"].metrics = metrics  # measured anew
    model.save_pretrained(tmp_path / "anew")
    for name in ("back", "anew"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert elsewhere not in card.text and card.data.eval_results


def test_numbers_from_before_a_training_are_not_those_of_what_it_gave(tmp_path, base_folder):
    donor = tiny_organ(1)
    donor.config.metrics = {"perplexity": {"before": 30.0, "after": 12.5}, "privacy": ["No attack found more."]}
    donor.save_pretrained(tmp_path / "donor")
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), tmp_path / "donor", is_trainable=True)
    folder = tmp_path / "out"
    arguments = TrainingArguments(folder, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows(2)).train()
    model.save_pretrained(folder)
    assert DonorModel.from_pretrained(folder).config.metrics is None
    text = ModelCard.load(folder / "README.md").text
    assert "12.5" not in text and "No attack" not in text
    measured = model.donor_config["default"].metrics = {"perplexity": {"before": 30.0, "after": 11.0}}
    model.save_pretrained(folder)
    assert DonorModel.from_pretrained(folder).config.metrics == measured


@pytest.mark.slow
def test_a_composition_keeps_order_and_what_is_active(token_ids, tmp_path, base_folder):
    base = base_folder("llama")
    a, b = (tiny_organ(seed) for seed in (1, 2))
    model = TransplantedForCausalLM.from_pretrained(base, a, donor_name="a", position=1)
    model.load_donor(b, "b", position=1)
    model.save_pretrained(tmp_path / "both", selected_donors=["b", "a"])
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "both")
    assert again.active_donors == ["a", "b"]
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))

    model = TransplantedForCausalLM.from_pretrained(base, a, donor_name="a", position=1, mode="replace")
    model.set_donor([])
    model.load_donor(b, "b", position=1, mode="replace")  # where a would be
    model.save_pretrained(tmp_path / "one-active")
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "one-active")
    assert again.active_donors == ["b"] and list(again.donor_config) == ["a", "b"]
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_a_composition_of_a_local_base_brings_its_tokenizer(tmp_path, base_folder):
    shutil.copytree(base_folder("llama"), tmp_path / "base")
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "base", A, donor_name="a")
    model.load_donor(C, "c", position=0)
    model.save_pretrained(tmp_path / "both")
    shutil.rmtree(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "both")("w5").input_ids == [5]


def test_saving_over_one_organ_leaves_no_stale_weights(tmp_path):
    model = transplanted(("a", A, {}))
    model.save_pretrained(tmp_path)
    model.load_donor(C, "c")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a", "c", "config.json"]


def test_an_organ_is_saved_with_the_recipient_it_was_used_in(token_ids, tmp_path):
    for seed, name in enumerate(("cut-from", "used-in")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
    donor = DonorModel.from_base(tmp_path / "cut-from", (1, 3))
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "used-in", donor)
    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "organ")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert donor.config.base_model_name_or_path == str(tmp_path / "cut-from")


@pytest.mark.parametrize(("cut_from", "used_in"), [("a", "b"), ("a", ""), ("", "b")])
def test_the_recipient_may_be_another_subfolder_of_one_folder(cut_from, used_in, token_ids, tmp_path):
    base = tmp_path / "base"
    for seed, name in enumerate((cut_from, used_in)):
        tiny_model("llama", seed=seed).save_pretrained(base / name)
    donor = DonorModel.from_base(base, (1, 3), subfolder=cut_from)
    model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="one", subfolder=used_in)
    model.save_pretrained(tmp_path / "organ")
    model.save_pretrained(tmp_path / "delta", delta="bfloat16")
    assert (DonorConfig.from_pretrained(tmp_path / "delta").delta.get("base_subfolder") or "") == cut_from
    model.load_donor(donor, "two", position=0)
    model.save_pretrained(tmp_path / "composition")
    for name in ("organ", "delta", "composition"):
        config = DonorConfig.from_pretrained(tmp_path / name)
        assert (config.base_model_name_or_path, config.base_subfolder or "") == (str(base), used_in)
    assert torch.equal(
        logits(TransplantedForCausalLM.from_pretrained(tmp_path / "composition"), token_ids), logits(model, token_ids)
    )


def test_a_live_recipient_does_not_say_which_subfolder_it_is_of(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base" / "a")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base", subfolder="a")
    donor = DonorModel.from_base(tmp_path / "base", (1, 3), subfolder="a")
    TransplantedForCausalLM.from_pretrained(live, donor).save_pretrained(tmp_path / "organ")
    assert DonorConfig.from_pretrained(tmp_path / "organ").base_subfolder == "a"


def test_an_organ_is_not_saved_over_another_model(tmp_path, token_ids):
    tiny_model("llama").save_pretrained(tmp_path)
    files = tree(tmp_path)
    model = TransplantedForCausalLM.from_pretrained(tmp_path, A)
    with pytest.raises(NotHFError, match="holds a model of type 'llama'"):
        model.save_pretrained(tmp_path)
    assert tree(tmp_path) == files


def test_a_composition_touches_only_its_own_files(tmp_path):
    model = transplanted(("a", A, {}), ("c", C, {}))
    (tmp_path / "model_backup.safetensors").write_bytes(b"mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model_backup.safetensors").read_bytes() == b"mine"
    (tmp_path / "README.md").write_text("---\n: [bad\n---\ntext")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    model.delete_donor("a")
    model.load_donor(tiny_organ(9, layers=(1, 2)), "a")
    with pytest.raises(NotHFError, match="cannot be read"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


def with_temperature(base, *donors: str) -> TransplantedForCausalLM:
    model = TransplantedForCausalLM.from_pretrained(base, A, donor_name="a")
    for name in donors:
        model.load_donor(C, name)
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    return model


@pytest.mark.slow
@pytest.mark.parametrize("donors", [(), ("c",)], ids=["donor", "composition"])
@pytest.mark.parametrize("where", ["folder", "repo"])
def test_a_changed_generation_config_is_kept(donors, where, base_folder, base_repo, hub, tmp_path):
    base = base_folder("llama") if where == "folder" else base_repo("llama")
    place = tmp_path if where == "folder" else f"me/warm-{len(donors)}"
    model = with_temperature(base, *donors)
    save = model.save_pretrained if where == "folder" else model.push_to_hub
    save(place)
    for load in (TransplantedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(place)
        assert again.generation_config.temperature == 0.3 and again.generation_config.do_sample
        assert type(again.generation_config) is type(model.generation_config)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "generation_config.json").exists()
    if not donors:  # a donor without a recipient keeps it too
        DonorModel.from_pretrained(place).save_pretrained(tmp_path / "copied")
        assert GenerationConfig.from_pretrained(tmp_path / "copied").temperature == 0.3
    # a recipient that is named has its own, and so has a caller who gives one
    assert TransplantedForCausalLM.from_pretrained(base, A).generation_config.temperature != 0.3
    given = GenerationConfig(temperature=0.9, do_sample=True)
    assert AutoModelForCausalLM.from_pretrained(place, generation_config=given).generation_config.temperature == 0.9
    if not donors:  # another one in its place has none
        other = DonorModel.from_base(base, (0, 2))
        (other.save_pretrained if where == "folder" else other.push_to_hub)(place)
        assert AutoModelForCausalLM.from_pretrained(place).generation_config.temperature != 0.3
        save(place)
    model.generation_config.temperature, model.generation_config.do_sample = 1.0, False  # as the base
    save(place)
    assert AutoModelForCausalLM.from_pretrained(place).generation_config.temperature != 0.3


def test_the_base_alone_generates_as_it_did(base_folder, tmp_path):
    with_temperature(base_folder("llama")).save_pretrained(tmp_path)
    model = TransplantedForCausalLM.from_pretrained(tmp_path)
    with model.disable_donors():
        assert model.generation_config.temperature != 0.3
        model.save_pretrained(tmp_path / "again")
    assert model.generation_config.temperature == 0.3
    assert reference_model(model).generation_config.temperature != 0.3
    assert TransplantedForCausalLM.from_pretrained(tmp_path / "again").generation_config.temperature == 0.3
    copied = pickle.loads(pickle.dumps(model))
    assert copied.unload().generation_config.temperature != 0.3
    assert copy.deepcopy(model).merge_and_unload().generation_config.temperature == 0.3
    model.generation_config = GenerationConfig(temperature=0.9)  # the user's own
    with model.disable_donors():
        assert model.generation_config.temperature == 0.9
    assert model.unload().generation_config.temperature == 0.9


def test_an_unchanged_generation_config_is_not_saved(base_folder, tmp_path):
    TransplantedForCausalLM.from_pretrained(base_folder("llama"), A).save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


def test_an_inconsistent_generation_config_does_not_stop_a_save(base_folder, tmp_path):
    """Trainer saves after hours."""
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), A)
    model.generation_config.temperature = 0.3  # which sampling is off for
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.3


def test_a_generation_config_keeps_values_of_its_model(base_folder, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), A)
    model.generation_config = GenerationConfig(chat_format="chatml")  # a key of its own, as in some repos
    model.save_pretrained(tmp_path)
    assert TransplantedForCausalLM.from_pretrained(tmp_path).generation_config.chat_format == "chatml"


@pytest.mark.parametrize("content", ["[]", "{", '{"validate": 3}', '{"__class__": 3}'])
def test_a_generation_config_that_is_none_is_refused(content, base_folder, tmp_path):
    with_temperature(base_folder("llama")).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CorruptDonorError, match=r"generation_config\.json: "):
        TransplantedForCausalLM.from_pretrained(tmp_path)
