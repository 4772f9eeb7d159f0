"""A trainable organ has float32 weights in a recipient of 16 bits, and computes as one of 16 bits does."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from not_hf import CorruptDonorError, DonorModel, DonorTrainer, TransplantedForCausalLM
from not_hf.architecture.master_weights import MasterWeights
from testing.donors import SPAN, moved, tiny_organ
from testing.interrupting import interrupted
from testing.models import TOKEN_IDS, logits, tiny_model

pytestmark = pytest.mark.slow


def half(model_type: str = "llama", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return tiny_model(model_type).to(dtype)


def trainable(model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **options) -> TransplantedForCausalLM:
    """The donor is float32."""
    donor = tiny_organ(1, model_type)
    return TransplantedForCausalLM.from_pretrained(half(model_type, dtype), donor, is_trainable=True, **options)


def dtypes(model: TransplantedForCausalLM, name: str = "default") -> list[str]:
    return model.get_donor_status()[name].dtypes


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "gpt_oss", "olmo2"])
def test_it_computes_what_rounded_weights_compute_and_learns_in_float32(model_type):
    model = trainable(model_type)
    frozen = TransplantedForCausalLM.from_pretrained(half(model_type), tiny_organ(1, model_type))
    assert dtypes(model) == ["float32"] and "bfloat16" in dtypes(frozen)
    assert torch.equal(logits(model, TOKEN_IDS), logits(frozen, TOKEN_IDS))
    model(TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(grad.dtype == torch.float32 for grad in gradients if grad is not None)


def test_the_weights_are_the_donors_bit_for_bit():
    donor = tiny_organ(1)
    model = TransplantedForCausalLM.from_pretrained(half(), donor, is_trainable=True)
    held = model._surgery.organs["default"].layers[0].mlp.up_proj.weight
    assert torch.equal(held, donor.stack.layers[0].mlp.up_proj.weight)


def test_it_can_be_switched_off():
    assert dtypes(trainable(autocast_donor_dtype=False)) == ["bfloat16"]
    model = TransplantedForCausalLM.from_pretrained(half(), tiny_organ(1), donor_name="a")
    model.load_donor(tiny_organ(2), "b", position=0, is_trainable=True)
    model.load_donor(tiny_organ(2), "c", position=0, is_trainable=True, autocast_donor_dtype=False)
    assert [dtypes(model, name) for name in "abc"] == [["bfloat16"], ["float32"], ["bfloat16"]]


def test_a_float32_recipient_needs_no_casts():
    model = trainable(dtype=torch.float32)
    assert not any(isinstance(layer, MasterWeights) for layer in model.model.layers)


@pytest.mark.parametrize("kind", [Trainer, DonorTrainer])
def test_small_steps_are_not_lost(kind, tmp_path):
    """Steps of 1e-5 on weights of about 1 are below the resolution of bfloat16."""
    losses, moved_share = [], []
    for options in ({}, {"autocast_donor_dtype": False}):
        model = trainable(**options)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        rows = [{"input_ids": TOKEN_IDS[0], "labels": TOKEN_IDS[0]}] * 8
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, learning_rate=1e-5, report_to="none", disable_tqdm=True, save_strategy="no"
        )
        trainer = kind(model, arguments, train_dataset=rows, data_collator=default_data_collator)
        losses.append(trainer.train().training_loss)
        changed = [(p != before[name]).float().mean() for name, p in model.named_parameters() if name in before]
        moved_share.append(float(torch.stack(changed).mean()))
    assert moved_share[0] > 0.99 > 0.7 > moved_share[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_cached_training_gives_the_losses_of_the_plain_trainer(tmp_path):
    def train(kind, **options) -> list[float]:
        donor = tiny_organ(1)
        model = TransplantedForCausalLM.from_pretrained(half(), donor, position=3, is_trainable=True)
        rows = [{"input_ids": (ids := TOKEN_IDS[0].roll(n)), "labels": ids} for n in range(8)]
        arguments = TrainingArguments(
            str(tmp_path / kind.__name__), max_steps=4, report_to="none", disable_tqdm=True, save_strategy="no",
            logging_steps=1, learning_rate=1e-3,
        )  # fmt: skip
        trainer = kind(model, arguments, train_dataset=rows, data_collator=default_data_collator, **options)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = train(Trainer)
    cached = train(DonorTrainer, cache_prefix=True, prefix_dir=str(tmp_path / "prefix"))
    assert cached == pytest.approx(plain, rel=2e-3)


def test_a_merge_rounds_and_an_organ_is_saved_as_held_or_as_asked_for(tmp_path):
    model = trainable()
    before = logits(model, TOKEN_IDS)
    model.save_pretrained(tmp_path)
    assert DonorModel.from_pretrained(tmp_path).dtype == torch.float32
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert DonorModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    native = model.merge_and_unload()
    assert {p.dtype for p in native.parameters()} == {torch.bfloat16}
    assert {type(layer) for layer in native.model.layers} == {type(tiny_model("llama").model.layers[0])}
    assert torch.equal(logits(native, TOKEN_IDS), before)


def test_a_merge_that_overflows_changes_nothing():
    model = trainable(dtype=torch.float16)
    with torch.no_grad():
        model._surgery.organs["default"].layers[0].mlp.up_proj.weight.fill_(1e5)
    with pytest.raises(CorruptDonorError, match=r"mlp.up_proj.weight as torch.float16"):
        model.merge_and_unload()
    assert dtypes(model) == ["float32"] and isinstance(model, TransplantedForCausalLM)
    assert isinstance(model._surgery.organs["default"].layers[0], MasterWeights)


def test_a_swap_keeps_float32_values():
    model, other = trainable(), tiny_organ(2)
    model.hotswap_donor("default", other)
    held = model._surgery.organs["default"].layers[1].mlp.up_proj.weight
    assert torch.equal(held, other.stack.layers[1].mlp.up_proj.weight)


def test_copies_pickles_casts_and_checkpointing(token_ids):
    model = trainable()
    before = logits(model, token_ids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dtypes(copied) == ["float32"] and torch.equal(logits(copied, token_ids), before)
    expected = model(token_ids, labels=token_ids).loss
    model.gradient_checkpointing_enable()
    model.train()
    loss = model(token_ids, labels=token_ids).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert dtypes(model.to(torch.bfloat16)) == ["bfloat16"]
    assert torch.equal(logits(model.eval(), token_ids), before)
    assert logits(model.to(torch.float32), token_ids).dtype == torch.float32


def test_adapters_on_top_of_it(token_ids):
    model = trainable()
    before = logits(model, token_ids)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(peft_model, token_ids), before)
    peft_model(token_ids, labels=token_ids).loss.backward()


@pytest.mark.exhaustive
def test_a_compiled_model_with_master_weights(token_ids):
    model = trainable()
    expected = model(token_ids, labels=token_ids).loss
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(token_ids, labels=token_ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert model._surgery.organs["default"].layers[0].mlp.up_proj.weight.grad.dtype == torch.float32


def test_an_interrupted_forward_leaves_its_master_weights():
    model, file = trainable(), ("/not_hf/architecture/upstream.py",)
    before, steps = list(model.parameters()), interrupted(lambda: model(TOKEN_IDS), files=file)
    for step in range(0, steps, 3):
        interrupted(lambda: model(TOKEN_IDS), step, files=file)
        assert all(after is parameter for after, parameter in zip(model.parameters(), before, strict=True)), step


@pytest.mark.slow
def test_threads_that_run_a_model_at_once_leave_its_master_weights():
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=99, **shape)).to(torch.bfloat16)
    donor = DonorModel.from_base(base, layers=(0, 2))
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True).eval()
    expected, before, outputs = logits(model, TOKEN_IDS), list(model.parameters()), []

    def run() -> None:
        for _ in range(10):
            outputs.append(logits(model, TOKEN_IDS))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 30 and all(torch.equal(output, expected) for output in outputs)
    assert all(after is parameter for after, parameter in zip(model.parameters(), before, strict=True))


def test_replicas_of_data_parallel_cast_their_tensors():
    """Made as `torch.nn.parallel.replicate` makes them, which wants GPUs: parameters are plain tensors there."""
    model = trainable()
    layer = model._surgery.organs["default"].layers[0]
    inputs: dict[str, Any] = {}
    handle = layer.register_forward_pre_hook(lambda layer, args, kw: inputs.update(args=args, kw=kw), with_kwargs=True)
    model(TOKEN_IDS, use_cache=False)
    handle.remove()
    replicas = {module: module._replicate_for_data_parallel() for module in layer.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for key, child in module._modules.items():
            replica._modules[key] = replicas[child]
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
                continue
            setattr(replica, key, parameter * 1)
            replica._former_parameters[key] = getattr(replica, key)
    found, expected = (each(*inputs["args"], **inputs["kw"]) for each in (replicas[layer], layer))
    assert torch.equal(found, expected)
    found.float().sum().backward()
    assert layer.mlp.up_proj.weight.grad.dtype == torch.float32


def test_a_donor_of_16_bits_is_trained_in_float32_too():
    donor = moved(DonorModel.from_base(half(), SPAN), 1)
    model = TransplantedForCausalLM.from_pretrained(half(), donor, is_trainable=True)
    assert donor.dtype == torch.bfloat16 and dtypes(model) == ["float32"]
