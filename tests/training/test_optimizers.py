"""Muon and AdamW as one optimizer: what they do apart, bit for bit, by hand and in Trainer."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM
from not_hf.training.optimizers import JointOptimizer, MuonWithAdamW
from testing.donors import same
from testing.models import tiny_model

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def transplanted(model_type: str = "llama") -> TransplantedForCausalLM:
    base = tiny_model(model_type)
    return TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3)), is_trainable=True)


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def steps(model: torch.nn.Module, optimizers: list, token_ids: torch.Tensor, num_steps: int, start: int = 0) -> None:
    """Steps at a rate that falls, on other tokens each time, with clipping."""
    for step in range(start, start + num_steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 1e-2 / (1 + step)
        ids = token_ids.roll(step, 1)
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def by_optimizer(model: torch.nn.Module) -> dict[str, list[str]]:
    """Names below their layer, by who trains them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for group in MuonWithAdamW()(model, **OPTIONS).param_groups:
        key = f"{group['optimizer']} {group['weight_decay']}"
        found[key] = sorted({names[id(p)].rpartition("layers.")[2].partition(".")[2] for p in group["params"]})
    return found


@pytest.mark.slow
def test_it_is_both_apart_bit_for_bit(token_ids):
    joint, apart = transplanted(), transplanted()
    parameters = {name: p for name, p in apart.named_parameters() if p.requires_grad}
    matrices = [p for p in parameters.values() if p.ndim == 2]
    norms = [p for p in parameters.values() if p.ndim == 1]
    muon = Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(norms, lr=1e-2, weight_decay=0.0)
    before = trained(apart)
    steps(apart, [muon, adamw], token_ids, 5)
    steps(joint, [MuonWithAdamW()(joint, **OPTIONS)], token_ids, 5)
    assert matrices and norms and same(trained(joint), trained(apart))
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trained(joint).items())


def test_who_trains_what():
    assert by_optimizer(transplanted()) == {
        "muon 0.1": [
            *("mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
            *(f"self_attn.{name}_proj.weight" for name in "koqv"),
        ],
        "adamw 0.1": [],
        "adamw 0.0": ["input_layernorm.weight", "post_attention_layernorm.weight"],
    }
    experts = by_optimizer(transplanted("gpt_oss"))
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= set(experts["adamw 0.1"])
    assert {"mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"} <= set(
        experts["adamw 0.0"]
    )  # 2D, no matrix
    assert {"mlp.router.weight", "self_attn.q_proj.weight"} <= set(experts["muon 0.1"])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert"])
def test_embeddings_and_the_head_are_adamws(model_type):
    model = tiny_model(model_type, tie_word_embeddings=False).requires_grad_(True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, *others = ([names[id(p)] for p in g["params"]] for g in MuonWithAdamW()(model, **OPTIONS).param_groups)
    layer = {"gpt2": "transformer.h.", "llama": "model.layers.", "bert": "bert.encoder.layer."}[model_type]
    outside = [name for name in matrices if not name.startswith(layer)]
    assert outside == (["cls.predictions.transform.dense.weight"] if model_type == "bert" else [])
    per_layer = {"gpt2": 4, "llama": 7, "bert": 6}[model_type]
    assert len(matrices) == 4 * per_layer + len(outside)
    assert sorted([*matrices, *itertools.chain(*others)]) == sorted(names.values())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_it_goes_on_where_it_was(way, token_ids):
    whole = transplanted()
    steps(whole, [MuonWithAdamW()(whole, **OPTIONS)], token_ids, 5)
    model = transplanted()
    optimizer = MuonWithAdamW()(model, **OPTIONS)
    steps(model, [optimizer], token_ids, 3)
    if way in ("pickle", "deepcopy"):
        both = (model, optimizer)
        model, optimizer = pickle.loads(pickle.dumps(both)) if way == "pickle" else copy.deepcopy(both)
    else:
        state, file = optimizer.state_dict(), io.BytesIO()
        if way == "file":
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        model = copy.deepcopy(model)
        optimizer = MuonWithAdamW()(model, **OPTIONS)
        optimizer.load_state_dict(state)
    steps(model, [optimizer], token_ids, 2, start=3)
    assert same(trained(model), trained(whole))


def test_a_closure_a_schedule_and_another_group(token_ids):
    model = transplanted()
    optimizer = MuonWithAdamW()(model, **OPTIONS)
    optimizer.add_param_group({"params": model.lm_head.weight.requires_grad_(True), "optimizer": "adamw", "lr": 2e-2})
    schedule = LambdaLR(optimizer, lambda step: 1 - step)  # nothing moves any more after the first step

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        return loss

    before = trained(model)
    loss = optimizer.step(closure)
    schedule.step()
    after = trained(model)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * 4
    assert optimizer.step(closure) < loss
    assert same(trained(model), after)
    with pytest.raises(NotHFError, match="'optimizer' of a group must be 'muon' or 'adamw', got None"):
        optimizer.add_param_group({"params": model.model.norm.weight})
    assert len(optimizer.param_groups) == 4


def test_what_it_refuses():
    with pytest.raises(NotHFError, match="no parameter of the model is trainable; load the organ with is_trainable"):
        MuonWithAdamW()(transplanted().requires_grad_(False), **OPTIONS)
    model = transplanted()
    plain = AdamW([{"params": [p for p in model.parameters() if p.requires_grad and p.ndim == n]} for n in (2, 1)])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        MuonWithAdamW()(model, **OPTIONS).load_state_dict(plain.state_dict())


@pytest.mark.slow
def test_trainer_resumes_to_the_weights_of_an_uninterrupted_run(tmp_path):
    def trainer(model: TransplantedForCausalLM, folder: Path) -> Trainer:
        ids = torch.randint(3, 90, (24, 16), generator=torch.Generator().manual_seed(0)).tolist()
        options = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "logging_steps": 1}
        return Trainer(
            model=model,
            args=TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **options),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            optimizer_cls_and_kwargs=(MuonWithAdamW, {**OPTIONS, "ns_steps": 3}),
        )

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    whole, half, fresh = transplanted(), transplanted(), transplanted()
    before = trained(whole)
    run = trainer(whole, tmp_path / "whole")
    run.train()
    assert isinstance(run.optimizer.optimizer, JointOptimizer)  # inside accelerate's
    assert all(group["ns_steps"] == 3 for group in run.optimizer.param_groups if group["optimizer"] == "muon")
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * (6 - n) / 6 for n in range(6)])
    assert not any(torch.equal(tensor, before[name]) for name, tensor in trained(whole).items())

    stopped = trainer(half, tmp_path / "half")
    stopped.add_callback(Stop())
    stopped.train()
    assert not same(trained(half), trained(whole))
    resumed = trainer(fresh, tmp_path / "half")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and same(trained(fresh), trained(whole))
