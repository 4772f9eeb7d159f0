"""What only encoders have: both sides, masks to fill, a class of their own."""

from __future__ import annotations

import runpy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
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
from testing.donors import SPAN, organ, same
from testing.models import logits, tiny_model, tiny_tokenizer
from testing.shapes import ENCODERS


@pytest.mark.parametrize("model_type", ENCODERS)
def test_padding_is_not_seen_and_both_sides_are(model_type, token_ids):
    base = tiny_model(model_type)
    model = TransplantedForMaskedLM.from_pretrained(base, organ(base, 1), position=2)
    mask = torch.ones_like(token_ids)
    mask[:, -3:] = 0
    other = token_ids.clone()
    other[:, -3:] = 7
    ours, theirs = (logits(model, ids, attention_mask=mask) for ids in (token_ids, other))
    assert torch.equal(ours[:, :-3], theirs[:, :-3])
    assert not torch.equal(logits(model, token_ids)[:, 0], logits(model, other)[:, 0])


@pytest.mark.slow
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
    organ(folder, 1, mode="replace").save_pretrained(tmp_path)
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
    assert same(ours, theirs)


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


@pytest.mark.slow
def test_the_example_runs(base_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(f"w{n + 3 + k % 9}" for k in range(12)) for n in range(8)))
    example = runpy.run_path(str(EXAMPLES / "fill_mask.py"))
    donor = tmp_path / "organ"
    given = {"--base": base_folder("modernbert"), "--text": text, "--donor": donor, "--steps": 2}
    example["main"]([*(str(each) for pair in given.items() for each in pair), "--layers", "1", "3"])
    assert "(was: w3)" in capsys.readouterr().out
    assert (donor / "model.safetensors").exists()
