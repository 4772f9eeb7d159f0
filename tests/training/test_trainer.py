"""`DonorTrainer` gives what `Trainer` gives, and computes less for it."""

from __future__ import annotations

import ast
import copy
import functools
import math
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, Trainer, TrainerCallback

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM
from not_hf.architecture.layers import is_dropout
from not_hf.training.checkpoints import last_complete_checkpoint
from not_hf.training.trainer import DonorTrainer
from testing.models import CHECKPOINTING, tiny_model, tiny_tokenizer
from testing.processes import forked
from testing.releases import since
from testing.shapes import in_matrix
from testing.training import losses, made, organ, recipient, rows, trained

OPT_DRAWS = since("transformers", "5.22", "opt draws a random number for each layer, used or not")
ARCHITECTURES = ["bloom", "cohere", "gemma2", "gpt_neox", "gpt2", "granite", "llama", "opt", "phi3", "qwen3"]
ARCHITECTURES += in_matrix("falcon_h1", "mamba2", "qwen3_5_text")  # with states
EXPERTS = in_matrix("gpt_oss", "mixtral", "nemotron_h", "qwen3_moe")


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours[0] == theirs[0]
    assert all(torch.equal(tensor, theirs[1][name]) for name, tensor in ours[1].items())


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=tolerance)
    for name, tensor in ours[1].items():
        torch.testing.assert_close(tensor, theirs[1][name], atol=tolerance, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [pytest.param(kind, marks=OPT_DRAWS if kind == "opt" else ()) for kind in ARCHITECTURES + EXPERTS]
)
def test_cached_and_uncached_train_the_same_organ(model_type, tmp_path):
    cached, plain = (
        trained(tmp_path / str(cache), recipient(model_type), cache_prefix=cache, num_train_epochs=2)
        for cache in (True, False)
    )
    # with experts, rounding depends on which tokens come together
    (assert_close if model_type in EXPERTS else assert_same)(cached, plain)
    assert plain[0][-1] < plain[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    in_matrix("falcon_h1", "gemma2", "gpt_neox", "gpt_oss", "llama", "nemotron_h", "qwen3_5_text", "qwen3_moe"),
)
def test_losses_are_those_of_the_plain_trainer(model_type, tmp_path):
    once = {"num_train_epochs": 1}
    plain = trained(tmp_path / "a", recipient(model_type), cls=Trainer, **once)
    assert_same(trained(tmp_path / "b", recipient(model_type), head_chunk=0, **once), plain)
    # Adam turns the rounding of a gradient near zero into a step
    chunked = trained(tmp_path / "c", recipient(model_type), head_chunk=7, **once)
    assert chunked[0] == pytest.approx(plain[0], abs=1e-4)


def with_z_loss(model_type: str) -> TransplantedForCausalLM:
    base = tiny_model(model_type, z_loss_coefficient=0.1)
    donor = DonorModel.from_base(base, (2, 3), mode="replace")
    return TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)


@pytest.mark.parametrize("model_type", in_matrix("bamba"))
def test_the_z_loss_is_that_of_the_plain_trainer_and_gives_no_perplexity(model_type, tmp_path):
    options = {"max_steps": 1, "eval_dataset": rows(4, seed=1)}
    ours, plain = (
        made(with_z_loss(model_type), tmp_path / cls.__name__, cls=cls, **options) for cls in (DonorTrainer, Trainer)
    )
    for trainer in (ours, plain):
        trainer.train()
    assert_same((losses(ours), organ(ours.model)), (losses(plain), organ(plain.model)))
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert ours.model.donor_config["default"].metrics is None


def with_router_loss(model_type: str) -> TransplantedForCausalLM:
    model = recipient(model_type)
    model.config.output_router_logits = True
    model.train()
    return model


@pytest.mark.parametrize("model_type", ["mixtral", *in_matrix("gpt_oss", "qwen3_moe")])
def test_the_loss_of_routers_is_that_of_the_plain_trainer(model_type, tmp_path):
    options = {"max_steps": 2, "eval_dataset": rows(4, seed=1)}
    ours, plain = (
        made(with_router_loss(model_type), tmp_path / cls.__name__, cls=cls, **options)
        for cls in (DonorTrainer, Trainer)
    )
    for trainer in (ours, plain):
        trainer.train()
    assert_same((losses(ours), organ(ours.model)), (losses(plain), organ(plain.model)))
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert ours.model.config.output_router_logits


@pytest.mark.slow
def test_the_prefix_is_run_once_for_each_row_and_not_at_all_in_the_next_run(tmp_path, monkeypatch):
    def rows_through_the_first_layer() -> int:
        model, seen = recipient(), []
        trainer = made(model, tmp_path, cache_prefix=True, num_train_epochs=4)
        first = model.model.layers[0]

        @functools.wraps(type(first).forward)
        def counting(layer: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.extend([hidden.shape] if layer is first else [])
            return counting.__wrapped__(layer, hidden, *args, **kwargs)

        with monkeypatch.context() as patch:  # a hook would turn the cache off
            patch.setattr(type(first), "forward", counting)
            trainer.train()
        return sum(batch for batch, seq, _ in seen if seq == 16)  # not those of the probes

    assert rows_through_the_first_layer() == 10
    assert rows_through_the_first_layer() == 0


@pytest.mark.slow
def test_an_organ_that_is_inserted_starts_at_its_position(tmp_path):
    options = {"mode": "insert", "init": "identity", "position": 3}
    assert_same(
        trained(tmp_path / "a", recipient(**options), cache_prefix=True), trained(tmp_path / "b", recipient(**options))
    )


@pytest.mark.slow
def test_dropout_of_the_organ_stays_and_that_below_it_is_off(tmp_path):
    model = recipient("gpt2")
    seen: dict[int, list[bool]] = {1: [], 2: []}
    for n, modes in seen.items():
        dropout = model.transformer.h[n].mlp.dropout
        dropout.register_forward_hook(lambda module, args, output, modes=modes: modes.append(module.training))
    made(model, tmp_path, max_steps=1).train()
    assert not any(seen[1]) and seen[2][-1]
    assert model.training and not model.transformer.drop.training


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("model_type", "rate"), [("starcoder2", "embedding_dropout"), ("opt", "layerdrop")])
def test_dropout_that_no_module_stands_for_is_off_below_the_organ(model_type, rate, cache, tmp_path):
    """It is in the forward pass of the module that contains the layers."""
    model = recipient(model_type)
    for module in model.modules():
        vars(module).update({key: 0.0 for key in vars(module) if is_dropout(module, key)})
    (around,) = (module for module in model.modules() if hasattr(module, rate))
    setattr(around, rate, 0.9)
    batch = {key: torch.stack([each[key] for each in rows(2)]) for key in ("input_ids", "labels")}
    expected = model.eval()(**batch).loss.item()
    trainer = made(model, tmp_path, cache_prefix=cache)
    found = [trainer.compute_loss(model.train(), dict(batch)).item() for _ in range(2)]
    assert found == pytest.approx([expected] * 2, abs=1e-5)
    assert model.training and all(layer.training for layer in trainer._stack.layers[2:])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"head_chunk": 0}, {"cache_prefix": True}], ids=str)
def test_noisy_embeddings_are_those_of_the_plain_trainer(options, tmp_path):
    once = {"max_steps": 2, "neftune_noise_alpha": 20.0}
    plain = trained(tmp_path / "a", cls=Trainer, **once)
    ours = trained(tmp_path / "b", **once, **options)
    assert ours[0] == pytest.approx(plain[0], abs=1e-4)
    assert ours[0] != pytest.approx(trained(tmp_path / "c", max_steps=2)[0], abs=1e-2)


@pytest.mark.slow
def test_the_base_of_the_kl_term_runs_without_dropout_and_noise(tmp_path):
    """The embeddings and the last layer run twice, in the base and in the model."""
    model = recipient("gpt2", mode="insert", init="identity")
    seen: list[tuple[int, bool]] = []
    for n, module in enumerate((model.transformer.wte, model.transformer.h[4].mlp.dropout)):
        module.register_forward_hook(lambda module, args, output, n=n: seen.append((n, module.training)))
    trainer = made(model, tmp_path, max_steps=1, kl_weight=1.0, neftune_noise_alpha=5.0)
    trainer.train()
    first = seen.index((0, True))
    assert seen[first - 2 : first + 2] == [(0, False), (1, False), (0, True), (1, True)]
    assert (0, True) not in seen[first + 2 :] and model.transformer.h[4].training


@pytest.mark.slow
def test_padding_on_the_right_is_not_kept(tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.padding_side = "right"
    texts = [{"input_ids": each["input_ids"][: 4 + n].tolist()} for n, each in enumerate(rows())]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        padded = DataCollatorWithPadding(tokenizer)(batch)
        return {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}

    plain = trained(tmp_path / "a", data=texts, data_collator=collate)
    cached = made(model := recipient(), tmp_path / "b", texts, data_collator=collate, cache_prefix=True)
    cached.train()
    assert_close((losses(cached), organ(model)), plain, 1e-3)
    assert len(cached._stack.prefix.store.rows) == 10  # whatever length their batches had
    size = sum(file.stat().st_size for file in (tmp_path / "b/prefixes").glob("*/*.rows"))
    assert size == sum(range(4, 14)) * 32 * 4


@pytest.mark.slow
def test_what_is_kept_in_bfloat16_is_half_as_large_and_nearly_the_same(tmp_path):
    plain = trained(tmp_path / "a")
    rounded = trained(tmp_path / "b", cache_prefix=True, prefix_dtype=torch.bfloat16)
    assert rounded[0] != plain[0] and rounded[0] == pytest.approx(plain[0], abs=2e-2)
    assert sum(file.stat().st_size for file in (tmp_path / "b/prefixes").glob("*/*.rows")) == 10 * 16 * 32 * 2
    # what is computed is rounded too: a second run, all from the cache, is the same run
    assert_same(trained(tmp_path / "b", cache_prefix=True, prefix_dtype=torch.bfloat16), rounded)


@pytest.mark.slow
def test_bf16_autocast(tmp_path):
    plain = trained(tmp_path / "a", cls=Trainer, bf16=True)
    ours = trained(tmp_path / "b", bf16=True)
    cached = trained(tmp_path / "c", bf16=True, cache_prefix=True)
    assert_same(cached, ours)
    assert ours[0] == pytest.approx(plain[0], abs=5e-2)


@pytest.mark.slow
def test_weights_position_and_precision_have_caches_of_their_own(tmp_path):
    def keys(**options: Any) -> str:
        model = options.pop("model", None) or recipient()
        trainer = made(model, tmp_path, cache_prefix=True, max_steps=1, **options)
        trainer.train()
        return trainer._stack.prefix.store.key

    other = recipient()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    above = recipient()
    with torch.no_grad():
        above.model.layers[3].mlp.up_proj.weight[0, 0] += 1e-3
    eager = recipient()
    eager.set_attn_implementation("eager")
    first = keys()
    assert keys() == first == keys(model=above)
    others = [
        keys(model=other),
        keys(model=recipient(span=(3, 4))),
        keys(bf16=True),
        keys(prefix_dtype=torch.bfloat16),
        keys(model=eager),
    ]
    assert len({first, *others}) == 6


@pytest.mark.slow
def test_a_cache_that_takes_nothing_trains_the_same(tmp_path):
    assert_same(trained(tmp_path / "a", cache_prefix=True, max_prefix_bytes=0), trained(tmp_path / "b"))


def test_evaluation_uses_the_cache_and_gives_the_loss_of_trainer(tmp_path):
    held_out = {"domain": rows(4, seed=1), "control": rows(4, seed=2)}
    plain = made(recipient(), tmp_path, cls=Trainer, eval_dataset=held_out).evaluate()
    trainer = made(recipient(), tmp_path, eval_dataset=held_out, cache_prefix=True)
    for _ in range(2):
        found = trainer.evaluate()
        for name in held_out:
            assert found[f"eval_{name}_loss"] == pytest.approx(plain[f"eval_{name}_loss"], abs=1e-5)
    assert trainer._stack.prefix.store.rows.hits == 8


@pytest.mark.slow
def test_evaluating_in_another_dtype(tmp_path):
    """`bf16_full_eval` casts the model for evaluation; what was kept for float32 is not used then."""
    options = {"eval_dataset": rows(4, seed=1), "bf16_full_eval": True}
    expected = made(recipient(), tmp_path, cls=Trainer, **options).evaluate()["eval_loss"]
    trainer = made(recipient(), tmp_path, cache_prefix=True, **options)
    trainer.train()
    trainer.model.load_state_dict(recipient().state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=2e-2)


@pytest.mark.slow
def test_a_model_made_anew_for_each_training(tmp_path):
    trainer = made(None, tmp_path, model_init=lambda: recipient(), cache_prefix=True)
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer)[-len(first) :] == first


def test_what_liger_asks_for_is_left_out_where_there_are_no_labels(tmp_path, monkeypatch):
    """With `use_liger_kernel`, `Trainer` evaluates with `skip_logits=True`, which Liger refuses without labels."""
    model = recipient()
    trainer = made(model, tmp_path, cache_prefix=True)
    cls = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
    native, given = cls.forward, []

    @functools.wraps(native)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given.append(kwargs.pop("skip_logits", None) and "labels" not in kwargs)
        return native(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    batch = {key: torch.stack([each[key] for each in rows(2)]) for key in ("input_ids", "labels")}
    found = [trainer.compute_loss(model, {**batch, **more}).item() for more in ({}, {"skip_logits": True})]
    assert found[0] == found[1] and len(given) > 4 and not any(given)
    assert trainer._stack.prefix.store.rows.hits == 2


def test_logits_are_there_for_whoever_asks(tmp_path):
    def compute_metrics(prediction: Any) -> dict[str, float]:
        return {"mean": float(np.mean(prediction.predictions))}

    found = [
        made(recipient(), tmp_path, cls=cls, eval_dataset=rows(4), compute_metrics=compute_metrics, **options)
        for cls, options in ((Trainer, {}), (DonorTrainer, {"cache_prefix": True}))
    ]
    assert found[0].evaluate()["eval_mean"] == found[1].evaluate()["eval_mean"]
    assert np.array_equal(found[0].predict(rows(4)).predictions, found[1].predict(rows(4)).predictions)


def with_penalty(trainer, model, inputs, return_outputs=False, **options):
    """A `compute_loss` that needs logits, as subclasses of `Trainer` are written."""
    loss, outputs = super(type(trainer), trainer).compute_loss(model, inputs, return_outputs=True, **options)
    loss = loss + outputs["logits"].pow(2).mean()
    return (loss, outputs) if return_outputs else loss


@pytest.mark.slow
def test_a_compute_loss_of_a_subclass_gets_logits(tmp_path):
    ours, plain = (
        made(recipient(), tmp_path / cls.__name__, cls=own, max_steps=2, eval_dataset=rows(4, seed=1))
        for cls in (DonorTrainer, Trainer)
        for own in [type("Own", (cls,), {"compute_loss": with_penalty})]
    )
    for trainer in (ours, plain):
        trainer.train()
    assert_same((losses(ours), organ(ours.model)), (losses(plain), organ(plain.model)))
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2},
        {CHECKPOINTING: True},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.pow(2).mean()},
        {"max_grad_norm": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_trainer_can_do_is_done(options, tmp_path):
    plain = trained(tmp_path / "a", cls=Trainer, **options)
    assert_same(trained(tmp_path / "b", head_chunk=0, cache_prefix=True, **options), plain)
    assert trained(tmp_path / "c", cache_prefix=True, **options)[0] == pytest.approx(plain[0], abs=1e-4)


def of_twelve_layers() -> TransplantedForCausalLM:
    base = tiny_model("llama", num_hidden_layers=12)
    return TransplantedForCausalLM.from_pretrained(
        base, DonorModel.from_base(base, (10, 12), mode="replace"), is_trainable=True
    )


@pytest.mark.parametrize("head_chunk", [None, 0])
def test_checkpointing_keeps_no_activations_below_the_organ(head_chunk, tmp_path):
    sizes, found = [], []
    for options in ({}, {CHECKPOINTING: True}):
        kept: list[int] = []
        with saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            found.append(trained(tmp_path, of_twelve_layers(), max_steps=1, head_chunk=head_chunk, **options))
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 2
    assert_same(*found)


@pytest.mark.parametrize("cache", [False, True])
def test_an_organ_learns_behind_reentrant_checkpoints(cache, tmp_path):
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}, "cache_prefix": cache}
    assert_same(trained(tmp_path / "a", max_steps=2, **options), trained(tmp_path / "b", max_steps=2))


def test_what_is_trained_below_the_organ_learns_with_checkpointing(tmp_path):
    found = [trained(tmp_path, with_trainable_embeddings(), max_steps=2, **{CHECKPOINTING: on}) for on in (0, 1)]
    assert_same(*found)


@pytest.mark.slow
def test_streams_and_early_stopping(tmp_path):
    def stream() -> IterableDataset:
        return IterableDataset.from_generator(lambda: iter(rows()))

    options = {
        "max_steps": 40,
        "eval_dataset": {"domain": rows(4, seed=5)},
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_domain_loss",
        "callbacks": [EarlyStoppingCallback(2)],
    }
    trainer = made(recipient(), tmp_path, stream(), cache_prefix=True, **options)
    trainer.train()
    assert trainer.state.global_step < 40
    best = trainer.evaluate()["eval_domain_loss"]
    assert best == pytest.approx(trainer.state.best_metric, abs=1e-6)


class MostLogits(TorchDispatchMode):
    """For how many tokens at once there were logits, at most."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.tokens = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            of_tokens = isinstance(each, torch.Tensor) and each.ndim and each.shape[-1] == self.vocab
            if of_tokens and each.untyped_storage().nbytes() >= each.nbytes:  # else a view of the head, expanded
                self.tokens = max(self.tokens, each.numel() // self.vocab)
        return out


@pytest.mark.parametrize("chunk", [40, 0])
def test_logits_of_all_tokens_are_never_in_memory(chunk, tmp_path):
    trainer = made(recipient(), tmp_path, head_chunk=chunk)
    batch = {key: torch.stack([each[key] for each in rows(8)]) for key in ("input_ids", "labels")}
    trainer.compute_loss(trainer.model, dict(batch))
    with MostLogits(trainer.model.config.vocab_size) as most:
        trainer.training_step(trainer.model, dict(batch), num_items_in_batch=120)
    assert most.tokens == (chunk or 8 * 16)  # the transposed head is of 32 rows


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("options", [{}, {"mode": "insert", "position": 3}])
def test_kl_holds_the_model_to_its_base(options, cache, tmp_path):
    model = recipient(**options)
    with torch.no_grad():
        for parameter in organ_parameters(model):
            parameter.mul_(1.5)
    batch = {key: torch.stack([each[key] for each in rows(2)]) for key in ("input_ids", "labels")}
    model.train()
    trainer = made(model, tmp_path, kl_weight=0.7, head_chunk=5, cache_prefix=cache)
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    with model.disable_donors(), torch.no_grad():
        expected = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    kl = functional.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
    by_hand = functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()) + 0.7 * kl
    by_hand.backward()
    assert kl > 0.001
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


def organ_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.slow
def test_kl_keeps_what_the_base_says(tmp_path):
    drift = {}
    for weight in (0.0, 20.0):
        model = recipient()
        ids = torch.stack([each["input_ids"] for each in rows(4, seed=9)])
        before = model(ids).logits.log_softmax(-1)
        made(model, tmp_path / str(weight), kl_weight=weight, num_train_epochs=6).train()
        drift[weight] = (model(ids).logits.log_softmax(-1) - before).abs().mean().item()
    assert drift[20.0] < 0.7 * drift[0.0]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_compiled_model(tmp_path):
    plain = trained(tmp_path / "a")
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "num_train_epochs": 3}
    assert trained(tmp_path / "b", cache_prefix=True, **options)[0] == pytest.approx(plain[0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_lora_on_an_organ(bf16, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[2], r=4)
    models = [get_peft_model(recipient(), copy.deepcopy(lora)) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    plain = trained(tmp_path / "a", models[0], cls=Trainer, bf16=bf16)[0]
    ours, cached = (
        trained(tmp_path / "b", model, cache_prefix=bool(n), bf16=bf16)[0] for n, model in enumerate(models[1:])
    )
    assert ours == cached == pytest.approx(plain, abs=5e-2 if bf16 else 1e-4)
    assert ours[0] == pytest.approx(plain[0], abs=1e-5)  # before gradients of chunks are rounded


def with_prompt(kind: type[PeftConfig]) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(recipient(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))


def test_a_trained_prompt(tmp_path):
    options = {"max_steps": 2, "eval_dataset": rows(2)}
    found = []
    for cls in (Trainer, DonorTrainer):
        trainer = made(with_prompt(PromptTuningConfig), tmp_path / cls.__name__, cls=cls, **options)
        trainer.train()
        found.append((losses(trainer), trainer.evaluate()["eval_loss"]))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "held", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"embed_tokens": [3]}}]
)
def test_kl_refuses_an_organ_with_frozen_modules_beside_its_layers(held, tmp_path):
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (2, 3), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True, **held).train()
    for module in (model.lm_head, model.get_input_embeddings()):
        module.requires_grad_(False)
    batch = {key: torch.stack([each[key] for each in rows(2)]) for key in ("input_ids", "labels")}
    with pytest.raises(NotHFError, match="an organ holds modules beside its layers; use kl_weight=0"):
        made(model, tmp_path, kl_weight=1.0).compute_loss(model, batch)
    assert model.active_donors == ["default"]


def test_the_base_of_the_kl_term_has_the_precision_of_the_model(tmp_path):
    """An organ that is a copy does not differ from it, with an adapter that does nothing yet."""
    model = get_peft_model(recipient(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[2]))
    batch = {key: torch.stack([each[key] for each in rows(2)]) for key in ("input_ids", "labels")}
    found = []
    for weight in (0.0, 1.0):
        trainer = made(model, tmp_path, bf16=True, kl_weight=weight)
        found.append(trainer.compute_loss(trainer.accelerator.prepare(model).train(), dict(batch)).item())
    assert found[0] == found[1]


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_callbacks_are_those_of_trainer(disable_tqdm, tmp_path):
    options = {"disable_tqdm": disable_tqdm, "callbacks": [EarlyStoppingCallback(2)]}
    ours, theirs = (
        [type(each) for each in made(recipient(), tmp_path, cls=cls, **options).callback_handler.callbacks]
        for cls in (DonorTrainer, Trainer)
    )
    assert ours == theirs and EarlyStoppingCallback in ours


@pytest.mark.parametrize("disable_tqdm", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_trainer_prints_is_printed(disable_tqdm, tmp_path, capsys):
    """Losses, and at the end the metrics of the training."""
    printed = []
    for cls in (Trainer, DonorTrainer):
        made(recipient(), tmp_path, cls=cls, max_steps=2, disable_tqdm=disable_tqdm).train()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        printed.append([ast.literal_eval(line).keys() for line in lines])
    theirs, ours = printed
    assert len(theirs) == len(ours) == 3 and "train_loss" in ours[-1]
    assert all(there <= here for there, here in zip(theirs, ours, strict=True))  # DonorTrainer counts tokens too


@pytest.mark.slow
def test_how_many_tokens_an_organ_has_seen(tmp_path):
    model = recipient()
    model.donor_config["default"].tokens_seen = 1000
    trainer = made(model, tmp_path, max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "organ")
    assert DonorModel.from_pretrained(tmp_path / "organ").config.tokens_seen == 1000 + (4 + 4 + 2 + 4) * 16


@pytest.mark.slow
@pytest.mark.parametrize("cls", [DonorTrainer, Trainer])
def test_a_push_keeps_the_organ_s_card(cls, hub, tmp_path):
    repo_id = f"me/pushed-by-{cls.__name__.lower()}"
    evaluated = {"eval_dataset": rows(2), "eval_strategy": "steps", "eval_steps": 1}
    trainer = made(recipient(), tmp_path, cls=cls, max_steps=1, hub_model_id=repo_id, **evaluated)
    trainer.train()
    trainer.push_to_hub(dataset="me/kjv", language="en", tags=["bible"])
    loaded = DonorModel.from_pretrained(repo_id)
    expected = organ(trainer.model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.values(), strict=True))
    assert loaded.config.datasets == ["me/kjv"]
    card = ModelCard.load(repo_id)
    assert {"not-hf", "bible"} <= set(card.data.tags) and card.data.library_name == "not_hf"
    assert (card.data.language, card.data.datasets) == ("en", ["me/kjv"])
    assert f'donor = "{repo_id}"' in card.text and "from_pretrained" in card.text
    assert "fine-tuned version of" not in card.text
    (loss,) = (logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs)
    assert f"| perplexity | – | {math.exp(loss):.4g} | – |" in card.text
    again = made(recipient(), tmp_path, cls=cls, max_steps=1, hub_model_id=repo_id)
    again.push_to_hub()  # what was said stays
    card = ModelCard.load(repo_id)
    assert "bible" in card.data.tags and (card.data.language, card.data.datasets) == ("en", ["me/kjv"])


def test_a_trainer_s_card_of_a_model_without_organs_is_its_own(hub, tmp_path):
    recipient().save_pretrained(tmp_path / "organ")
    trainer = made(tiny_model("llama"), tmp_path, cls=Trainer, max_steps=1, hub_model_id="me/no-organ")
    trainer.push_to_hub()
    card = ModelCard.load("me/no-organ")
    assert "generated_from_trainer" in card.data.tags and card.data.library_name == "transformers"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: recipient(span=(0, 1)), {"cache_prefix": True}, "the first layer is trainable"),
        (lambda: recipient().requires_grad_(False), {"cache_prefix": True}, "nothing is trainable"),
        (lambda: with_trainable_embeddings(), {"cache_prefix": True}, "everything below the organ frozen"),
        (lambda: tiny_model("llama"), {"kl_weight": 1.0}, "needs a model with organs"),
        (recipient, {"kl_weight": -1.0}, "0 or more"),
        (recipient, {"kl_weight": math.nan}, "kl_weight must be 0 or more, got nan"),
        (recipient, {"kl_weight": 1.0, "head_chunk": 0}, "chunked loss"),
        (lambda: with_router_loss("mixtral"), {"kl_weight": 1.0}, "chunked loss.*a router loss"),
        (lambda: with_router_loss("mixtral"), {"cache_prefix": True}, "the router loss is of all layers"),
        (lambda: with_prompt(PromptTuningConfig), {"kl_weight": 1.0}, "chunked loss.*PEFT's prompt learning"),
        (lambda: with_prompt(PromptTuningConfig), {"cache_prefix": True}, "use cache_prefix=False, or LoRA"),
        (lambda: with_prompt(PrefixTuningConfig), {"cache_prefix": True}, "use cache_prefix=False, or LoRA"),
    ],
)
def test_what_cannot_be_had_is_refused(model, options, message, tmp_path):
    model = model()
    model.train()
    batch = {key: torch.stack([each[key] for each in rows(2)]) for key in ("input_ids", "labels")}
    with pytest.raises(NotHFError, match=message):
        made(model, tmp_path, **options).compute_loss(model, batch)
    layers = model.model.layers
    assert not any(type(layer).__name__ == "SkippedLayer" for layer in layers)


@pytest.mark.parametrize("name", ["optimizers", "optimizer_cls_and_kwargs"])
def test_two_optimizers_are_refused(name, tmp_path):
    model = recipient()
    values = {
        "optimizers": (torch.optim.SGD(model.parameters()), None),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0}),
    }
    with pytest.raises(NotHFError, match="optimizer='muon' makes the optimizer; leave out"):
        made(model, tmp_path, optimizer="muon", **{name: values[name]})


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [None, "muon"])
def test_arguments_that_are_changed_before_the_training_count(optimizer, tmp_path):
    """As `hyperparameter_search` changes them."""
    trainer = made(recipient(), tmp_path, max_steps=1, optimizer=optimizer, lr_scheduler_type="constant")
    trainer.args.learning_rate, trainer.args.weight_decay = 1e-5, 0.5
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-5}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5, 0.0}


def with_trainable_embeddings() -> TransplantedForCausalLM:
    model = recipient()
    model.get_input_embeddings().requires_grad_(True)
    return model


def test_an_error_in_a_step_leaves_the_model_as_it_was(tmp_path):
    model = recipient()
    ids = rows(1)[0]["input_ids"][None]
    trainer = made(model, tmp_path, cache_prefix=True)
    trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids})
    before = list(model.model.layers)
    with pytest.raises(IndexError):
        trainer.compute_loss(model, {"input_ids": ids, "labels": ids + 1000})
    assert list(model.model.layers) == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in before)


class Slow(TrainerCallback):
    """Tells of each step, and makes every save slow enough to be hit in the middle."""

    def __init__(self, told: Connection) -> None:
        self.told = told

    def on_step_end(self, args, state, control, **kwargs):
        self.told.send(state.global_step)
        time.sleep(0.05)


def go_on(folder: Path, told: Connection) -> None:
    """What the process does that the next test kills."""
    trainer = made(recipient("gpt2"), folder, cache_prefix=True, callbacks=[Slow(told)], **KILLED)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / "run"))
    trainer.save_model(folder / "organ")


KILLED = {"num_train_epochs": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "seed": 3}


@pytest.mark.slow
def test_killed_anywhere_and_resumed_gives_the_same_organ(tmp_path):
    """A process killed at several moments, checkpoints half written among them; with dropout in the organ."""
    steps, told = multiprocessing.Pipe(duplex=False)
    for delay in (0.0, 0.06, 0.13):
        process = forked(go_on, tmp_path / "killed", told)
        for _ in range(3):
            assert steps.poll(60)
            steps.recv()
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -9
        while steps.poll():  # those of the delay
            steps.recv()
    newest = max((tmp_path / "killed/run").glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))
    state = newest / "trainer_state.json"
    state.write_text(state.read_text()[:40] if state.exists() else "{")  # the last one as if cut short
    assert last_complete_checkpoint(tmp_path / "killed/run") != str(newest)
    process = forked(go_on, tmp_path / "killed", told)
    process.join(60)
    assert process.exitcode == 0
    trainer = made(recipient("gpt2"), tmp_path / "whole", cache_prefix=True, **KILLED)
    trainer.train()
    expected = organ(trainer.model)
    found = DonorModel.from_pretrained(tmp_path / "killed/organ")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.values(), strict=True))


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(NotHFError, match="no complete checkpoint"):
        made(recipient(), tmp_path).train(resume_from_checkpoint=True)
