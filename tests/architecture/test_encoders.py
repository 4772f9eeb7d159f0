"""Encoders through the promises of the causal matrix: what must not change is bit-identical."""

from __future__ import annotations

import copy
import pickle
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from not_hf import (
    DonorModel,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
    UnsupportedArchitectureError,
    check_compatibility,
)
from testing import EXAMPLES
from testing.models import ENCODERS, PRE_NORM, enable_checkpointing, logits, tiny_config, tiny_model, tiny_tokenizer

SPAN = (1, 3)
every = pytest.mark.parametrize("model_type", ENCODERS)


def trained(donor: DonorModel) -> DonorModel:
    """Move every weight, so that the organ matters wherever it stands."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return donor


def with_organ(model_type: str, mode: str = "insert", position: int | None = 2, **kwargs) -> PreTrainedModel:
    base = tiny_model(model_type)
    donor = trained(DonorModel.from_base(base, SPAN))
    return TransplantedForMaskedLM.from_pretrained(base, donor, position=position, mode=mode, **kwargs)


@every
def test_replacing_layers_by_themselves_changes_nothing(model_type, token_ids):
    base = tiny_model(model_type)
    before = logits(base, token_ids)
    model = TransplantedForMaskedLM.from_pretrained(base, DonorModel.from_base(base, SPAN, mode="replace"))
    assert model is base and isinstance(model, TransplantedForMaskedLM)
    assert torch.equal(logits(model, token_ids), before)


@every
def test_identity_is_a_no_op_before_the_norm_and_refused_after_it(model_type, token_ids):
    base = tiny_model(model_type)
    if model_type in PRE_NORM:
        before = logits(base, token_ids)
        model = TransplantedForMaskedLM.from_pretrained(base, DonorModel.from_base(base, SPAN, init="identity"))
        assert model.config.num_hidden_layers == 6
        assert torch.equal(logits(model, token_ids), before)
    else:
        with pytest.raises(UnsupportedArchitectureError, match="use init='copy'"):
            DonorModel.from_base(base, SPAN, init="identity")


@every
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_disabled_deleted_and_unloaded_are_the_base(model_type, mode, token_ids):
    base = tiny_model(model_type)
    native, config, before = type(base), base.config.to_dict(), logits(base, token_ids)
    donor = trained(DonorModel.from_base(base, SPAN))
    model = TransplantedForMaskedLM.from_pretrained(base, donor, position=1, mode=mode)
    after = logits(model, token_ids)
    assert not torch.equal(after, before)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied, TransplantedForMaskedLM) and torch.equal(logits(copied, token_ids), after)
    with model.disable_donors():
        assert model.config.to_dict() == config
        assert torch.equal(logits(model, token_ids), before)
    assert torch.equal(logits(model, token_ids), after)
    if mode == "insert":
        model.load_donor(donor, "second", position=4)
        model.set_donor("second")
        assert model.active_donors == ["second"]
        model.delete_donor("second")
        model.set_donor("default")
        assert torch.equal(logits(model, token_ids), after)
    model.delete_donor("default")
    assert torch.equal(logits(model, token_ids), before)
    unloaded = model.unload()
    assert type(unloaded) is native and unloaded.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in unloaded.parameters())
    assert torch.equal(logits(unloaded, token_ids), before)


@every
def test_an_organ_alone_continues_the_hidden_states_of_the_base(model_type, token_ids):
    base = tiny_model(model_type)
    mask = torch.ones_like(token_ids)
    mask[0, -3:] = 0
    donor = DonorModel.from_base(base, SPAN)
    with torch.no_grad():
        hidden = base(token_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        out = donor(inputs_embeds=hidden[SPAN[0]], attention_mask=mask).last_hidden_state
    assert torch.equal(out[mask.bool()], hidden[SPAN[1]][mask.bool()])


@every
def test_padding_is_not_seen_and_both_sides_are(model_type, token_ids):
    model = with_organ(model_type)
    mask = torch.ones_like(token_ids)
    mask[:, -3:] = 0
    other = token_ids.clone()
    other[:, -3:] = 7
    ours, theirs = (logits(model, ids, attention_mask=mask) for ids in (token_ids, other))
    assert torch.equal(ours[:, :-3], theirs[:, :-3])
    assert not torch.equal(logits(model, token_ids)[:, 0], logits(model, other)[:, 0])


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_organ_and_nothing_else(model_type, checkpointing, token_ids):
    base = tiny_model(model_type)
    model = TransplantedForMaskedLM.from_pretrained(base, DonorModel.from_base(base, SPAN), is_trainable=True)
    if checkpointing:
        enable_checkpointing(model)
    model.train()
    model(token_ids, labels=token_ids).loss.backward()
    organ = {id(p) for layer in model._surgery.organs["default"].layers for p in layer.parameters()}
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    assert reached == {id(p) for p in model.parameters() if p.requires_grad} == organ
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


@every
def test_cut_from_a_folder_saved_and_loaded_by_itself(model_type, token_ids, base_folder, tmp_path):
    folder = base_folder(model_type)
    base = AutoModelForMaskedLM.from_pretrained(folder)
    donor, live = DonorModel.from_base(folder, SPAN), DonorModel.from_base(base, SPAN)
    assert donor.state_dict().keys() == live.state_dict().keys()
    assert all(torch.equal(tensor, live.state_dict()[name]) for name, tensor in donor.state_dict().items())
    model = TransplantedForMaskedLM.from_pretrained(base, trained(donor), position=3)
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert isinstance(again, TransplantedForMaskedLM) and again.donor_config["default"].position == 3
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    organ = AutoModel.from_pretrained(tmp_path)
    assert isinstance(organ, DonorModel)
    assert all(torch.equal(tensor, donor.state_dict()[name]) for name, tensor in organ.state_dict().items())


@pytest.fixture(scope="module")
def without_not_hf(tmp_path_factory, token_ids):
    """Logits of every merged model, computed by one process that cannot import not_hf."""
    root, expected = tmp_path_factory.mktemp("merged"), {}
    for model_type in ENCODERS:
        for mode in ("insert", "replace"):
            model = with_organ(model_type, mode, position=1)
            expected[model_type, mode] = logits(model, token_ids)
            native = model.merge_and_unload()
            assert not isinstance(native, TransplantedForMaskedLM)
            native.save_pretrained(root / f"{model_type}-{mode}")
    torch.save(token_ids, root / "ids.pt")
    script = """
        import sys, torch
        sys.modules["not_hf"] = None  # importing it raises
        from pathlib import Path
        from transformers import AutoModelForMaskedLM
        torch.set_num_threads(1)
        root = Path(sys.argv[1])
        ids = torch.load(root / "ids.pt")
        found = {}
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], (folder, info)
            with torch.no_grad():
                found[folder.name] = model(ids).logits
        torch.save(found, root / "found.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(root)], check=True)
    return expected, torch.load(root / "found.pt")


@every
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_merged_models_load_without_not_hf(model_type, mode, without_not_hf):
    expected, found = without_not_hf
    assert torch.equal(found[f"{model_type}-{mode}"], expected[model_type, mode])


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "roberta"])
def test_trainer_trains_the_organ_alone_and_resumes(model_type, base_folder, tmp_path):
    folder, tokenizer = base_folder(model_type), tiny_tokenizer()
    donor = DonorModel.from_base(folder, SPAN, mode="replace")
    model = TransplantedForMaskedLM.from_pretrained(folder, donor, is_trainable=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    texts = [" ".join(f"w{n + 3 + k % 9}" for k in range(12)) for n in range(8)]
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]

    def trainer(model: PreTrainedModel, steps: int) -> Trainer:
        return Trainer(
            model,
            TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, report_to=[], learning_rate=1e-2, seed=0),
            train_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0),
        )

    trainer(model, 2).train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and changed <= trainable
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(name.startswith("organ.") for name in saved)
    again = TransplantedForMaskedLM.from_pretrained(folder, donor, is_trainable=True)
    resumed = trainer(again, 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_fill_mask_by_the_donor_alone_without_a_warning(base_folder, tmp_path, caplog):
    folder = base_folder("modernbert")
    trained(DonorModel.from_base(folder, SPAN, mode="replace")).save_pretrained(tmp_path)
    fill = pipeline("fill-mask", model=str(tmp_path))
    assert isinstance(fill.model, TransplantedForMaskedLM)
    assert len(fill("w5 <mask> w7", top_k=3)) == 3
    assert "not supported" not in caplog.text
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "AutoModelForMaskedLM" in card and "CausalLM" not in card


def test_names_of_old_bert_checkpoints_are_understood(base_folder, tmp_path, token_ids):
    """bert-base-uncased on the Hub calls the weights of its norms gamma and beta."""
    model = AutoModelForMaskedLM.from_pretrained(base_folder("bert"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = (DonorModel.from_base(each, SPAN).state_dict() for each in (tmp_path, model))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_class_names_the_other(base_folder, tmp_path):
    bert, llama = base_folder("bert"), base_folder("llama")
    donor = DonorModel.from_base(bert, SPAN)
    donor.save_pretrained(tmp_path)
    for call in (
        lambda: TransplantedForCausalLM.from_pretrained(bert, donor),
        lambda: TransplantedForCausalLM.from_pretrained(tiny_model("bert"), donor),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        with pytest.raises(UnsupportedArchitectureError, match="'bert' is an encoder; use TransplantedForMaskedLM"):
            call()
    with pytest.raises(UnsupportedArchitectureError, match="'llama' is a causal LM; use TransplantedForCausalLM"):
        TransplantedForMaskedLM.from_pretrained(llama, DonorModel.from_base(llama, SPAN))


def test_a_bert_that_decodes_is_a_causal_lm(token_ids):
    base = tiny_model("bert", is_decoder=True)
    before = logits(base, token_ids)
    donor = DonorModel.from_base(base, SPAN, mode="replace")
    model = TransplantedForCausalLM.from_pretrained(base, donor)
    assert torch.equal(logits(model, token_ids), before)
    assert any("is_decoder True" in line for line in check_compatibility(donor, tiny_model("bert")))


def test_the_first_layer_of_modernbert_stays_first():
    """It has no norm before its attention, so neither it nor another may take the other's place."""
    base = tiny_model("modernbert")
    first, second = DonorModel.from_base(base, (0, 1), mode="replace"), DonorModel.from_base(base, (1, 2))
    assert check_compatibility(first, base) == []
    assert "built of other modules" in check_compatibility(first, base, position=1)[0]
    assert "built of other modules" in check_compatibility(second, base, position=0)[0]


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("albert", {}, "no list of num_hidden_layers=4 layers"),
        ("mpnet", {}, "cannot be run without the rest"),
        ("deberta-v2", {"relative_attention": True}, "cannot be run without the rest"),
    ],
)
def test_layers_that_share_are_refused(model_type, overrides, reason):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = AutoModelForMaskedLM.from_config(tiny_config(model_type, **sizes, **overrides))
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DonorModel.from_base(model, SPAN)


@pytest.mark.parametrize(("model_type", "reason"), [("bert", "a norm undoes it"), ("distilbert", "they still write")])
def test_layers_that_do_not_follow_a_scale_have_none(model_type, reason, token_ids):
    model = with_organ(model_type)
    before = logits(model, token_ids)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        model.set_donor_scale("default", 0.5)
    assert model.donor_config["default"].scale == 1 and torch.equal(logits(model, token_ids), before)


def test_the_example_runs(base_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{n + 3 + k % 9}" for k in range(12)) for n in range(8)))
    example = runpy.run_path(str(EXAMPLES / "fill_mask.py"))
    donor = tmp_path / "organ"
    given = {"--base": base_folder("modernbert"), "--text": text, "--donor": donor, "--steps": 2}
    example["main"]([*(str(each) for pair in given.items() for each in pair), "--layers", "1", "3"])
    assert "(was: w3)" in capsys.readouterr().out
    assert (donor / "model.safetensors").exists()
