"""TRL's `SFTTrainer` and `DPOTrainer`; the reference of DPO is the base, without a second copy of it."""

from __future__ import annotations

import copy
import functools
import math
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

from not_hf import (
    DonorDPOTrainer,
    DonorModel,
    DonorSFTTrainer,
    NotHFError,
    TransplantedForCausalLM,
    reference_model,
)
from testing import EXAMPLES
from testing.donors import organ, same
from testing.models import tiny_model, tiny_tokenizer
from testing.processes import run_python
from testing.releases import since
from testing.training import losses, recipient
from testing.training import organ as weights

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


CACHED = since("trl", "1.16", "the cache follows the batches of this release")
TEXTS = Dataset.from_dict({"text": [" ".join(f"w{7 * n % 80 + m + 3}" for m in range(4 + n)) for n in range(8)]})
# the turns of the assistant are marked, so that `assistant_only_loss` finds them
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w5 {% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}w4 {{ m.content }} </s> {% endif %}{% endfor %}"
)
CHATS = Dataset.from_dict(
    {
        "messages": [
            [{"role": "user", "content": f"w{n + 10} w{n + 11}"}, {"role": "assistant", "content": f"w{n + 30} w9"}]
            for n in range(8)
        ]
    }
)


def cached_sft(cls, folder: Path, data: Dataset = TEXTS, model=None, options=None, **more) -> SFTTrainer:
    """Two epochs; batches of one width, so that rounding does not depend on their rows."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    common = {key: value for key, value in COMMON.items() if key != "max_steps"} | {"save_strategy": "no"}
    common |= {"num_train_epochs": 2, "max_length": 16, "pad_to_multiple_of": 16, **(options or {})}
    if cls is DonorSFTTrainer:
        more |= {"cache_prefix": True, "prefix_dir": folder / "prefixes"}
    args = SFTConfig(output_dir=str(folder / cls.__name__), **common)
    model = recipient() if model is None else model
    return cls(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **more)


@CACHED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "options"),
    [
        (TEXTS, {}),
        (TEXTS, {"packing": True, "per_device_train_batch_size": 1, "pad_to_multiple_of": None}),
        (TEXTS, {"packing": True, "packing_strategy": "wrapped"}),
        (CHATS, {"assistant_only_loss": True}),
        (TEXTS, {"gradient_accumulation_steps": 2, "loss_type": "dft"}),
        (TEXTS, {"bf16": True}),
    ],
    ids=["texts", "packed", "wrapped", "chats", "dft", "bf16"],
)
def test_sft_with_the_cache_gives_sft_s_organ(data, options, tmp_path):
    plain, ours = (cached_sft(cls, tmp_path, data, options=options) for cls in (SFTTrainer, DonorSFTTrainer))
    for trainer in (plain, ours):
        trainer.train()
    assert losses(ours) == losses(plain) and len(losses(ours)) > 2
    expected = weights(plain.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours.model).items())
    for ours_logged, logged in zip(ours.state.log_history, plain.state.log_history, strict=True):
        for metric in ("entropy", "mean_token_accuracy", "num_tokens"):
            assert ours_logged.get(metric) == logged.get(metric)
    store = ours._stack.prefix.store.rows
    assert store.hits >= len(store) > 0 and store.misses == 0  # all of the second epoch
    hits = store.hits
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)
    assert store.hits > hits


@CACHED
@pytest.mark.slow
def test_packed_documents_are_found_beside_others(tmp_path):
    options = {"packing": True, "num_train_epochs": 3, "seed": 1, "pad_to_multiple_of": None}
    plain, ours = (cached_sft(cls, tmp_path, options=options) for cls in (SFTTrainer, DonorSFTTrainer))
    for trainer in (plain, ours):
        trainer.train()
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-4)
    store = ours._stack.prefix.store.rows
    assert len(store) == len(TEXTS) and store.hits == 2 * len(TEXTS)


@CACHED
@pytest.mark.slow
def test_packing_needs_a_model_that_keeps_documents_apart(tmp_path):
    with pytest.raises(NotHFError, match="does not keep them apart; use packing=False"):
        cached_sft(DonorSFTTrainer, tmp_path, model=recipient("bloom"), options={"packing": True})


@CACHED
@pytest.mark.slow
def test_sft_writes_what_the_organ_has_seen(tmp_path):
    ours = cached_sft(DonorSFTTrainer, tmp_path)
    ours.train()
    ours.evaluate()
    ours.save_model(tmp_path / "organ")
    config = DonorModel.from_pretrained(tmp_path / "organ").config
    assert config.tokens_seen == 2 * sum(len(text.split()) + 1 for text in TEXTS["text"])  # with EOS, not the padding
    assert config.metrics["perplexity"]["after"] > 1


def dpo_pairs() -> Dataset:
    """Of one length, so that all batches are of one width."""
    rows = [{"prompt": f"w{n + 3} w4", "chosen": f" w{n + 20} w7", "rejected": f" w{n + 40} w9"} for n in range(8)]
    return Dataset.from_list(rows)


@CACHED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("span", "options"),
    [
        ({}, {}),
        ({"mode": "insert", "position": 3}, {"loss_type": ["sigmoid", "sft"], "gradient_accumulation_steps": 2}),
        ({}, {"precompute_ref_log_probs": True}),
    ],
    ids=["replaced", "inserted", "precomputed"],
)
def test_dpo_with_the_cache_gives_dpo_s_organ(span, options, tmp_path, monkeypatch):
    trainers = []
    for cls in (DPOTrainer, DonorDPOTrainer):
        common = {key: value for key, value in COMMON.items() if key != "max_steps"} | {"save_strategy": "no"}
        args = DPOConfig(output_dir=str(tmp_path / cls.__name__), **common, num_train_epochs=2, **options)
        model = recipient(**span)
        with torch.no_grad():
            for parameter in weights(model):
                model.get_parameter(parameter).mul_(1.1)  # no longer the reference
        cache = cls is DonorDPOTrainer
        more = {"cache_prefix": True, "prefix_dir": tmp_path / "prefixes"} if cache else {}
        reference = None if cache else reference_model(model)
        pairs = dpo_pairs()
        trainer = cls(
            model, reference, args, train_dataset=pairs, eval_dataset=pairs, processing_class=tiny_tokenizer(), **more
        )
        trainer.train()
        trainers.append(trainer)
    plain, ours = trainers
    assert losses(ours) == losses(plain) and len(losses(ours)) > 2
    expected = weights(plain.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours.model).items())
    for ours_logged, logged in zip(ours.state.log_history, plain.state.log_history, strict=True):
        for metric in ("logps/chosen", "logits/rejected", "rewards/margins", "mean_token_accuracy"):
            assert ours_logged.get(metric) == logged.get(metric)
    store = ours._stack.prefix.store.rows
    assert len(store) == store.hits == 2 * 8
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert store.hits == 2 * 8 * 2 and ours.model.donor_config["default"].metrics is None
    assert ours.model.active_donors == ["default"]


@CACHED
@pytest.mark.slow
def test_the_reference_has_the_base_s_embeddings_and_head(tmp_path):
    found = []
    for cls in (DPOTrainer, DonorDPOTrainer):
        base = tiny_model("llama")
        donor = DonorModel.from_base(base, (2, 3), mode="replace")
        held = {"modules_to_save": ["embed_tokens", "lm_head"]}
        model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True, **held)
        for module in (model.get_input_embeddings(), model.lm_head):
            module.requires_grad_(False).weight.mul_(1.5)
        cache = cls is DonorDPOTrainer
        more = {"cache_prefix": True, "prefix_dir": tmp_path / "prefixes"} if cache else {}
        args = DPOConfig(output_dir=str(tmp_path / cls.__name__), **{**COMMON, "max_steps": 1})
        reference = None if cache else reference_model(model)
        trainer = cls(model, reference, args, train_dataset=dpo_pairs(), processing_class=tiny_tokenizer(), **more)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1] and found[0] != pytest.approx([math.log(2)], abs=1e-3)  # that of the reference itself


@CACHED
@pytest.mark.slow
def test_the_reference_skips_the_prefix_too(tmp_path, monkeypatch):
    args = DPOConfig(output_dir=str(tmp_path), **{**COMMON, "max_steps": -1, "num_train_epochs": 3})
    model, passes = recipient(), []
    trainer = DonorDPOTrainer(
        model,
        args=args,
        train_dataset=dpo_pairs(),
        processing_class=tiny_tokenizer(),
        cache_prefix=True,
        prefix_dir=tmp_path / "prefixes",
    )
    layer, first = type(model.model.layers[0]), model.model.layers[0]
    forward = layer.forward

    @functools.wraps(forward)
    def counting(self, hidden, *args, **kwargs):
        if self is first and hidden.shape[0] > 1:  # not those of the probes
            passes.append(hidden.shape[0])
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", counting)
    trainer.train()
    assert passes == [4] * 4  # the batches of the first epoch, for model and reference together


@CACHED
@pytest.mark.slow
def test_dpo_of_an_adapter_or_against_another_model(base_folder, tmp_path):
    """The reference is then what `DPOTrainer` takes, or what was given."""
    for number, own in enumerate((False, True)):
        found = []
        for cls in (DPOTrainer, DonorDPOTrainer):
            args = DPOConfig(output_dir=str(tmp_path / cls.__name__), **{**COMMON, "max_steps": -1})
            lora = LoraConfig(target_modules=["q_proj"], layers_to_transform=[2], r=4)
            more = {} if cls is DPOTrainer else {"cache_prefix": True, "prefix_dir": tmp_path / f"prefixes{number}"}
            more |= {"ref_model": tiny_model("llama")} if own else {"peft_config": lora}
            torch.manual_seed(0)
            trainer = cls(recipient(), args=args, train_dataset=dpo_pairs(), processing_class=tiny_tokenizer(), **more)
            trainer.train()
            found.append(losses(trainer))
        assert found[0] == found[1] and len(found[0]) > 2


def test_a_reference_on_the_model_s_own_weights_is_not_synchronized(tmp_path):
    model = recipient()
    args = DPOConfig(output_dir=str(tmp_path), sync_ref_model=True, **COMMON)
    for reference in (None, reference_model(model)):
        with pytest.raises(NotHFError, match=r"give ref_model=copy\.deepcopy\(model\)"):
            DonorDPOTrainer(model, reference, args, train_dataset=PAIRS, processing_class=tiny_tokenizer())


@pytest.mark.slow
def test_a_reference_of_its_own_is_synchronized(tmp_path):
    model = recipient()
    reference, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5}
    args = DPOConfig(output_dir=str(tmp_path), **COMMON, **sync)
    DonorDPOTrainer(model, reference, args, train_dataset=PAIRS, processing_class=tiny_tokenizer()).train()
    assert reference.active_donors == model.active_donors
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(tensor, (before[name] + model.state_dict()[name]) / 2)


def test_without_trl_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    names = runpy.run_path(sys.modules[DonorSFTTrainer.__module__].__file__)
    for name in ("DonorSFTTrainer", "DonorDPOTrainer"):
        with pytest.raises(ImportError, match=f"{name} needs TRL; pip install trl"):
            names[name](recipient())


@pytest.mark.slow
def test_trl_is_imported_when_it_is_asked_for():
    script = "import sys, not_hf, not_hf.training.trainer; print('trl' in sys.modules)"
    assert run_python("-c", script).stdout == "False\n"


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


@torch.no_grad()
def test_the_reference_has_no_dropout(token_ids):
    model = recipient("gpt2", mode="insert")
    reference = reference_model(model)
    expected = reference(token_ids).logits
    model.train()
    assert torch.equal(reference(token_ids).logits, expected)
    assert model.transformer.h[0].mlp.dropout.training


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
