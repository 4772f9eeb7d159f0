"""TRL's `SFTTrainer` and `DPOTrainer`; the reference of DPO is the base, without a second copy of it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM, reference_model
from testing import EXAMPLES
from testing.donors import organ, same
from testing.models import tiny_model, tiny_tokenizer
from testing.releases import since

PAIRS = Dataset.from_dict({"prompt": ["w3 w4 w5"] * 8, "chosen": [" w6 w7"] * 8, "rejected": [" w9 w11"] * 8})
COMMON = {
    "max_steps": 3,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def trainable(base: Path) -> TransplantedForCausalLM:
    return TransplantedForCausalLM.from_pretrained(base, organ(base, 1), is_trainable=True)


def dpo(model, reference, folder: Path) -> DPOTrainer:
    args = DPOConfig(output_dir=str(folder), **COMMON)
    return DPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=PAIRS, processing_class=tiny_tokenizer()
    )


@torch.no_grad()
def test_the_reference_is_the_base_on_shared_weights(base_folder, token_ids):
    model, base = trainable(base_folder("llama")), AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    reference = reference_model(model)
    with_organ = model(token_ids).logits
    assert torch.equal(reference(token_ids).logits, base(token_ids).logits)
    assert torch.equal(
        reference.generate(token_ids, max_new_tokens=4, do_sample=False),
        base.generate(token_ids, max_new_tokens=4, do_sample=False),
    )
    assert torch.equal(model(token_ids).logits, with_organ) and not torch.equal(with_organ, base(token_ids).logits)
    ours = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in reference.parameters()} <= ours
    assert reference.config is model.base_config and type(reference).__name__ == "LlamaForCausalLM"
    model.train()
    assert model.training and reference.eval() is reference and model.model.training  # the mode is the carrier's


def test_a_reference_needs_organs():
    with pytest.raises(NotHFError, match="LlamaForCausalLM has no organs"):
        reference_model(tiny_model("llama"))


@pytest.mark.slow
def test_dpo_with_the_shared_reference_is_dpo_with_a_second_base(base_folder, tmp_path):
    base = base_folder("llama")
    shared, separate = trainable(base), trainable(base)
    run = dpo(shared, reference_model(shared), tmp_path / "shared")
    run.train()
    dpo(separate, AutoModelForCausalLM.from_pretrained(base), tmp_path / "separate").train()
    assert same(shared, separate)
    assert shared.active_donors == ["default"]
    saved = load_file(tmp_path / "shared" / "checkpoint-3" / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == shared.get_nb_trainable_parameters()[0]

    resumed = trainable(base)
    dpo(resumed, reference_model(resumed), tmp_path / "shared").train(
        resume_from_checkpoint=str(tmp_path / "shared" / "checkpoint-2")
    )
    assert same(resumed, shared)


@pytest.mark.slow
def test_sft_saves_organs_and_resumes(base_folder, tmp_path):
    def sft(model):
        args = SFTConfig(output_dir=str(tmp_path / "run"), max_length=16, **COMMON)
        rows = Dataset.from_dict({"text": ["w3 w4 w5 w6 w7"] * 8})
        return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer())

    model, resumed = trainable(base_folder("llama")), trainable(base_folder("llama"))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = sft(model)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert DonorModel.from_pretrained(tmp_path / "run" / "checkpoint-3").config.layers == [1, 3]
    sft(resumed).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(resumed, model)


@pytest.mark.slow
@since("trl", "1.9", "it looks for the class of a model in transformers only")
@pytest.mark.parametrize("several", [False, True], ids=["donor", "composition"])
def test_by_name(several, base_folder, tmp_path):
    """TRL reads the class of the model from the config; `is_trainable` goes through `model_init_kwargs`."""
    model = trainable(base_folder("llama"))
    if several:
        model.load_donor(organ(base_folder("llama"), 2), "second")
    model.save_pretrained(folder := str(tmp_path / "organ"))
    args = SFTConfig(output_dir=str(tmp_path / "sft"), max_length=16, **COMMON)
    args.model_init_kwargs = {"is_trainable": True}
    rows = Dataset.from_dict({"text": ["w3 w4 w5 w6 w7"] * 8})
    run = SFTTrainer(model=folder, args=args, train_dataset=rows)
    assert isinstance(run.model, TransplantedForCausalLM) and len(run.model.active_donors) == 1 + several
    run.train()
    assert not same(run.model, model)
    run = DPOTrainer(
        model=folder,
        args=DPOConfig(output_dir=str(tmp_path / "dpo"), **COMMON),
        train_dataset=PAIRS,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    assert isinstance(run.model.get_base_model(), TransplantedForCausalLM)
    run.train()


def test_training_what_is_frozen_is_told(base_folder, caplog):
    """TRL's gradient checkpointing hides it: the loss stands still."""
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), organ(base_folder("llama"), 1))
    model.eval()
    assert "no parameter" not in caplog.text
    model.train()
    assert "no parameter of the model can be trained" in caplog.text and "is_trainable=True" in caplog.text
    caplog.clear()
    trainable(base_folder("llama")).train()
    assert not caplog.records


@pytest.mark.slow
def test_the_example_runs(base_folder, tmp_path, monkeypatch):
    example = EXAMPLES / "train_with_trl.py"
    options = ["--base", str(base_folder("llama")), "--layers", "1", "3", "--steps", "2", "--cpu"]
    monkeypatch.setattr(sys, "argv", [str(example), *options, "--output", str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")
    assert DonorModel.from_pretrained(tmp_path / "organ").config.layers == [1, 3]
