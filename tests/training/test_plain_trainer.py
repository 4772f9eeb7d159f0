"""Training with the plain `transformers.Trainer`: organ-only checkpoints, resuming, the best model at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from not_hf import DonorModel, TransplantedForCausalLM
from not_hf.recipient.saving import organ_tensors as saved_tensors
from testing.donors import same
from testing.models import CHECKPOINTING, enable_checkpointing, tiny_model, tiny_tokenizer


def trainer(model, blocks: Dataset, folder: Path, **options) -> Trainer:
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=blocks,
        eval_dataset=blocks.select(range(4)),
        processing_class=tiny_tokenizer(),
    )


def trainable(base, model_type: str = "llama") -> TransplantedForCausalLM:
    donor = DonorModel.from_base(base, layers=(1, 3), mode="replace")
    recipient = tiny_model(model_type) if not isinstance(base, str | Path) else base
    return TransplantedForCausalLM.from_pretrained(recipient, donor, is_trainable=True)


def organ_tensors(model: TransplantedForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in saved_tensors(model, model._surgery, "default").items()}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "repo"])
def test_trainer_trains_the_organ_and_saves_only_it(where, blocks, base_folder, base_repo, tmp_path, token_ids):
    base = base_folder("llama") if where == "folder" else base_repo("llama")
    model = trainable(base)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = organ_tensors(model)
    run = trainer(model, blocks, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in organ_tensors(model).items())

    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert same(saved, organ_tensors(model))
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        expected = model(token_ids).logits
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
        assert torch.equal(again(token_ids).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(model_type, blocks, tmp_path):
    whole = trainable(tiny_model(model_type), model_type)
    trainer(whole, blocks, tmp_path / "whole").train()
    half = trainable(tiny_model(model_type), model_type)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    stopped = trainer(half, blocks, tmp_path / "half")
    stopped.add_callback(Stop())
    stopped.train()
    assert not same(organ_tensors(half), organ_tensors(whole))
    fresh = trainable(tiny_model(model_type), model_type)
    resumed = trainer(fresh, blocks, tmp_path / "half")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert same(organ_tensors(fresh), organ_tensors(whole))


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(blocks, tmp_path):
    model = trainable(tiny_model("llama"))
    run = trainer(
        model,
        blocks,
        tmp_path,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # upside down, so that the first checkpoint is the best
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert same(organ_tensors(model), load_file(best / "model.safetensors"))
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


@pytest.mark.slow
def test_an_organ_of_a_bf16_base_trains_and_loads_in_fp32(blocks, tmp_path):
    base = tiny_model("llama").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    assert {p.dtype for p in DonorModel.from_base(tmp_path / "base", (1, 3)).parameters()} == {torch.bfloat16}
    donor = DonorModel.from_base(tmp_path / "base", (1, 3), mode="replace", dtype="float32")
    recipient = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = TransplantedForCausalLM.from_pretrained(recipient, donor, is_trainable=True)
    run = trainer(model, blocks, tmp_path / "run")
    run.train()
    saved = DonorModel.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert {p.dtype for p in saved.parameters()} == {torch.float32} and saved.config.dtype == torch.float32
    assert same(saved.state_dict(), organ_tensors(model))
    before = organ_tensors(model)
    run._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-6"))
    assert same(organ_tensors(model), before)


@pytest.mark.slow
def test_gradient_checkpointing_computes_the_same(blocks, tmp_path):
    plain, checkpointed = trainable(tiny_model("llama")), trainable(tiny_model("llama"))
    trainer(plain, blocks, tmp_path / "plain").train()
    run = trainer(checkpointed, blocks, tmp_path / "checkpointed", **{CHECKPOINTING: True})
    run.train()
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.layers)
    assert same(organ_tensors(plain), organ_tensors(checkpointed))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_inserted_layer_checkpoints_like_its_neighbours(use_reentrant, token_ids):
    base = tiny_model("llama")
    enable_checkpointing(base, {"use_reentrant": use_reentrant})
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3)), is_trainable=True)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model.train()
    model(token_ids, labels=token_ids, use_cache=False).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_what_trainer_pushes_is_the_organ(blocks, tmp_path, hub):
    model = trainable(tiny_model("llama"))
    run = trainer(model, blocks, tmp_path, push_to_hub=True, hub_model_id="me/trained-organ", save_strategy="no")
    run.train()
    run.push_to_hub()
    pushed = DonorModel.from_pretrained("me/trained-organ")
    assert same(pushed.state_dict(), organ_tensors(model))
