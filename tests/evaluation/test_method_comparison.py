"""Methods are measured on text that they have not seen, each at its scales, and the base stays as it was."""

from __future__ import annotations

import json
import math
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from not_hf import DonorModel, IncompatibleDonorError, NotHFError, TransplantedForCausalLM, compare_methods
from not_hf.evaluation import compared_methods, method_comparison, timed_training
from not_hf.evaluation.compared_methods import Prepared, donor_names
from not_hf.evaluation.held_out_text import TextParts
from not_hf.evaluation.method_comparison import SCALES
from not_hf.training.trainer import DonorTrainer
from testing.donors import organ
from testing.models import TOKEN_IDS, exact_logits, tiny_model, tiny_tokenizer

LENGTH = 32
TEXTS = [" ".join(f"w{3 + (7 * line + n) % 88}" for n in range(39)) for line in range(60)]  # 40 tokens, EOS included
GENERAL = [" ".join(f"w{90 - (5 * line + 3 * n) % 86}" for n in range(39)) for line in range(20)]
HOW = {"tokenizer": tiny_tokenizer(), "block_length": LENGTH, "budget": 3}
TRAINED = {"organ": compared_methods.prepare_organ, "LoRA": compared_methods.prepare_lora}
TRAINED["full fine-tuning"] = compared_methods.prepare_full


def parts(texts=TEXTS, length=LENGTH):
    return TextParts.of(texts, tiny_tokenizer(), length)


@torch.no_grad()
def loss(model, blocks):
    ids = torch.tensor(blocks)
    return model(ids, labels=ids).loss.item()


def state(model):
    return {name: (each.sum().item(), each.requires_grad) for name, each in model.named_parameters()}, model.config


@pytest.mark.slow
def test_all_learn_in_the_same_time_and_the_base_stays(tmp_path):
    base = tiny_model("llama")
    base.lm_head.weight.requires_grad_(False)
    before = state(base)
    rates = {"organ": 1e-2, "LoRA": 1e-2, "full fine-tuning": 1e-3}
    found = compare_methods(base, iter(TEXTS), iter(GENERAL), donors=[organ(base, 1)], rates=rates, **HOW)
    assert state(base) == before and not base.training
    first, *trained, donor = found.rows
    assert [row["method"] for row in found.rows] == ["base", *rates, "donor"] and not found.skipped
    for row in trained:
        assert row["rate"] == rates[row["method"]] and row["tokens"] == row["steps"] * 2 * LENGTH > 0
        assert row["seconds"] >= HOW["budget"] / 9 and row["saved_bytes"] > 1000
        assert row["peak_bytes"] is None or row["peak_bytes"] > 10_000_000
        for prefix in ("", "control_"):
            assert row[f"{prefix}low"] < row[f"{prefix}perplexity"] < row[f"{prefix}high"]
            ratio = row[f"{prefix}perplexity"] / first[f"{prefix}perplexity"]
            assert row[f"{prefix}perplexity_ratio"] == pytest.approx(ratio)
            assert row[f"{prefix}ratio_low"] < ratio < row[f"{prefix}ratio_high"]
        assert row["ratio_high"] < 1
    assert first["perplexity_ratio"] == 1 and first["steps"] is donor["steps"] is None and donor["saved_bytes"]
    assert [(row["method"], row["scale"]) for row in found.front] == [
        (method, scale) for method in (*rates, "donor") for scale in SCALES
    ]
    found.save(tmp_path)
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["rows"] == found.rows and saved["front"] == found.front and saved["nats"] == found.nats
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "compare.md").read_text()
    assert "| full fine-tuning |" in page and "(compare.png)" in page and "| control, change |" in page
    assert saved["num_tokens"].keys() == {"train", "choose", "test", "control"} and saved["peft"]


@pytest.mark.slow
def test_numbers_are_losses_on_the_held_out_parts():
    base, donor = tiny_model("llama"), organ(tiny_model("llama"), 1)
    found = compare_methods(base, TEXTS, donors=[donor], rates={}, **HOW)
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    held, chosen = parts(), {}
    for row in found.front:
        model.set_donor_scale("default", row["scale"])
        assert math.log(row["perplexity"]) == pytest.approx(loss(model, held.test), rel=1e-5)
        chosen[row["scale"]] = loss(model, held.choose)
    first, second = found.rows
    assert second["scale"] == min(chosen, key=chosen.get)
    assert math.log(first["perplexity"]) == pytest.approx(loss(base, held.test), rel=1e-5)
    assert sum(found.nats["base"]["test"]) == pytest.approx(loss(base, held.test) * found.about["num_tokens"]["test"])
    assert "control_perplexity" not in first and found.about["dealt_by"] == "passage"


def test_parts_share_no_document():
    held = parts()
    used = {name: {id for block in getattr(held, name) for id in block} for name in ("train", "choose", "test")}
    assert all(used.values()) and len(held.train) > 2 * len(held.test) > 2 * len(held.choose)
    texts = [f"w{3 + n}" for n in range(80) for _ in range(5)]  # a word in five short texts that follow each other
    held, tokens = parts(texts, length=10), []
    for part in (held.train, held.choose, held.test):
        tokens.append({token for block in part for token in block} - {tiny_tokenizer().eos_token_id})
    assert held.dealt_by == "passage" and not (tokens[0] & tokens[1] or tokens[0] & tokens[2] or tokens[1] & tokens[2])
    whole = parts([" ".join(TEXTS)])
    assert whole.dealt_by == "block" and len(whole.train) > 2 * len(whole.test) > 2 * len(whole.choose) > 0


@pytest.mark.parametrize("method", TRAINED)
def test_scales_lie_between_the_base_and_what_was_trained(method, tmp_path):
    prepared = TRAINED[method](lambda: tiny_model("llama"))
    start = exact_logits(tiny_model("llama"), TOKEN_IDS)
    assert torch.equal(exact_logits(prepared.model, TOKEN_IDS), start)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in prepared.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    end, distances = exact_logits(prepared.model, TOKEN_IDS), []
    for scale in (0.5, 1.0, 0.0):
        prepared.set_scale(scale)
        distances.append((exact_logits(prepared.model, TOKEN_IDS) - start).norm().item())
    assert 0 == distances[2] < distances[0] < distances[1]
    prepared.set_scale(1.0)
    assert torch.equal(exact_logits(prepared.model, TOKEN_IDS), end)
    prepared.model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert prepared.saved_bytes == sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.slow
def test_training_ends_by_the_clock_and_the_rate_falls_until_then(monkeypatch):
    rates, ticks = [], iter(range(1000))

    class Watched(DonorTrainer):
        def training_step(self, *args, **kwargs):
            rates.append(self.optimizer.param_groups[0]["lr"])
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(timed_training.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(timed_training, "_WARMUP", 2)
    organ = TRAINED["organ"](lambda: tiny_model("llama"))
    prepared = Prepared(organ.model, organ.set_scale, organ.saved_bytes, Watched)
    found = timed_training.train_for(5, prepared, parts().train, name="organ", rate=1e-3, batch_size=2, seed=0)
    assert rates == pytest.approx([0.5e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.2e-3])
    assert (found["steps"], found["seconds"], found["tokens"]) == (5, 5, 5 * 2 * LENGTH)
    assert "forward" not in vars(organ.model)


def test_a_step_is_one_batch_on_a_machine_with_several_gpus(monkeypatch):
    ticks, num_rows = iter(range(1000)), []

    class OfTwoGPUs(timed_training.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            assert self.device.type == "cpu"  # which sets `_n_gpu`
            self._n_gpu = 2

    class Watched(DonorTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            num_rows.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(timed_training, "TrainingArguments", OfTwoGPUs)
    monkeypatch.setattr(timed_training.time, "perf_counter", lambda: next(ticks))
    organ = TRAINED["organ"](lambda: tiny_model("llama"))
    prepared = Prepared(organ.model, organ.set_scale, organ.saved_bytes, Watched)
    found = timed_training.train_for(2, prepared, parts().train, name="organ", rate=1e-3, batch_size=2, seed=0)
    assert num_rows == [2, 2] and found["tokens"] == 2 * 2 * LENGTH


@pytest.mark.slow
def test_what_runs_out_of_memory_is_left_out(monkeypatch, tmp_path):
    base, train, large = tiny_model("llama"), method_comparison.train_for, {"organ", "full fine-tuning"}
    models = []

    def out_of_memory(seconds, prepared, blocks, *, name, **how):
        assert not [each for each in models if each() is not None]  # those before are out of memory
        models.append(weakref.ref(prepared.model))
        if name in large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train(seconds, prepared, blocks, name=name, **how)

    monkeypatch.setattr(method_comparison, "train_for", out_of_memory)
    found = compare_methods(base, TEXTS, **HOW)
    assert [row["method"] for row in found.rows] == [*found.nats] == ["base", "LoRA"]
    assert {row["method"] for row in found.front} == {"LoRA"}
    assert [each["method"] for each in found.skipped] == ["organ", "full fine-tuning"]
    found.save(tmp_path)
    page = (tmp_path / "compare.md").read_text()
    assert "full fine-tuning was left out: it ran out of memory; give a smaller batch_size or block_length." in page
    large.add("LoRA")
    with pytest.raises(torch.OutOfMemoryError):
        compare_methods(base, TEXTS, **HOW)


@pytest.mark.slow
def test_what_cannot_be_scaled_is_measured_as_it_is():
    found = {}
    for model_type, options in (("gemma2", {}), ("llama", {"modules_to_save": ["lm_head"]})):
        base = tiny_model(model_type)
        donor = organ(base, 1, **options)
        found[model_type] = compare_methods(base, TEXTS, donors=[donor], rates={}, **HOW)
        model = TransplantedForCausalLM.from_pretrained(base, donor)
        (row,) = found[model_type].front
        assert row["scale"] == 1 and math.log(row["perplexity"]) == pytest.approx(loss(model, parts().test), rel=1e-5)


@pytest.mark.slow
def test_what_diverges_stays_in_the_table(tmp_path):
    found = compare_methods(tiny_model("llama"), TEXTS, rates={"full fine-tuning": 1e12}, **HOW)
    worst = next(row for row in found.front if row["scale"] == 1)
    assert found.rows[1]["scale"] == 0 and not worst["perplexity"] < 1e6
    found.save(tmp_path)
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][1]["perplexity_ratio"] == 1


@pytest.mark.slow
def test_one_copy_of_the_base_at_a_time(monkeypatch):
    load, copies = method_comparison._load, []

    def watched(base):
        assert not [each for each in copies if each() is not None]
        model = load(base)
        copies.append(weakref.ref(model))
        return model

    monkeypatch.setattr(method_comparison, "_load", watched)
    base = tiny_model("llama")
    compare_methods(base, TEXTS, rates={}, donors=[organ(base, 1), organ(base, 2, mode="replace")], **HOW)
    assert len(copies) == 3


@pytest.mark.slow
def test_a_model_that_peft_refuses_is_found_before_training(monkeypatch):
    monkeypatch.setattr(method_comparison, "train_for", None)
    base = tiny_model("mamba")
    found = compare_methods(base, TEXTS, rates={"LoRA": 1e-3}, donors=[organ(base, 1)], **HOW)
    assert [row["method"] for row in found.rows] == ["base", "donor"]
    assert found.skipped[0]["reason"].startswith("PEFT refuses the model: ") and "'out_proj'" in str(found.skipped)


@pytest.mark.slow
def test_peft_and_matplotlib_may_be_missing(monkeypatch, tmp_path):
    for module in (compared_methods, method_comparison):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    base = tiny_model("llama")
    found = compare_methods(base, TEXTS, rates={"LoRA": 1e-3}, donors=[organ(base, 1)], **HOW)
    assert [row["method"] for row in found.rows] == ["base", "donor"] and "peft" not in found.about
    assert found.skipped == [{"method": "LoRA", "reason": "PEFT is not installed; pip install peft"}]
    with pytest.raises(NotHFError, match="nothing to compare; PEFT is not installed; pip install peft"):
        compare_methods(base, TEXTS, rates={"LoRA": 1e-3}, **HOW)
    found.save(tmp_path)
    page = (tmp_path / "compare.md").read_text()
    assert "LoRA was left out: PEFT is not installed; pip install peft." in page and ".png" not in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["compare.json", "compare.md"]


def test_names_of_donors(tmp_path):
    live = DonorModel.from_base(tiny_model("llama"), (1, 2))
    donors = ["me/gpt2-kjv", tmp_path / "a" / "organ", f"{tmp_path}/b/organ/", live]
    assert donor_names(donors) == ["donor me/gpt2-kjv", "donor organ (1)", "donor organ (2)", "donor"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget, in seconds, must be a number above 0, got 0"),
        ({"budget": math.nan}, "budget, in seconds, must be a number above 0, got nan"),
        ({"budget": "1m"}, "budget, in seconds, must be a number above 0, got '1m'"),
        ({"rates": {"organ": -1}}, r"rates\['organ'\] must be a number above 0, got -1"),
        ({"rates": {"DoRA": 1e-3}}, "no method 'DoRA'; rates may name 'organ', 'LoRA', 'full fine-tuning'"),
        ({"rates": {}}, "nothing to compare"),
        ({"rates": ["organ"]}, r"rates must be a dict, such as \{'organ': 3e-4\}, got \['organ'\]"),
        ({"donors": "me/gpt2-kjv"}, r"donors must be a list, got a single donor; give donors=\[donor\]"),
        ({"block_length": 1000}, "block_length must be between 2 and 64, the base's context, got 1000"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 1000}, "blocks to train on, fewer than batch_size=1000"),
        ({"data": TEXTS[:2]}, "the text has 80 tokens, .*; give at least 320 tokens, or a smaller block_length"),
        ({"data": TEXTS[0]}, "data must be a list of texts, got a string"),
        ({"control": ["w5"]}, "the control text has fewer than 64 tokens"),
        ({"tokenizer": None}, "a live model needs its tokenizer"),
        ({"base": tiny_model("bert")}, "bert does not predict the next token; use a causal LM"),
    ],
)
def test_says_what_is_wrong(change, message, monkeypatch):
    monkeypatch.setattr(method_comparison, "_load", None)  # nothing is loaded before all is checked
    with pytest.raises(NotHFError, match=message):
        compare_methods(**{"base": tiny_model("llama"), "data": TEXTS, **HOW, **change})


@pytest.mark.slow
def test_donors_and_bases_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(method_comparison, "_load", None)
    base, wide = tiny_model("llama"), organ(tiny_model("llama", hidden_size=64), 1)
    wide.save_pretrained(tmp_path / "wide")
    for donor, name in ((wide, "donor"), (tmp_path / "wide", "donor wide")):
        with pytest.raises(IncompatibleDonorError, match=f"^{name}: .*hidden_size 64 does not fit"):
            compare_methods(base, TEXTS, donors=[donor], **HOW)
    spare = DonorModel.from_base(base, (1, 2), trainable_token_indices={"embed_tokens": [1]})
    spare.config.trainable_token_indices = {"embed_tokens": [len(tiny_tokenizer())]}
    with pytest.raises(NotHFError, match="rows for tokens that the tokenizer lacks"):
        compare_methods(base, TEXTS, donors=[spare], **HOW)
    with pytest.raises(NotHFError, match="is a donor; give the model that it was cut from"):
        compare_methods(tmp_path / "wide", TEXTS, **HOW)
    with pytest.raises(NotHFError, match="the base is wrapped in PeftModel; give the model without it"):
        compare_methods(get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear")), TEXTS, **HOW)
    with pytest.raises(NotHFError, match="the base has organs"):
        compare_methods(TransplantedForCausalLM.from_pretrained(base, organ(base, 1)), TEXTS, **HOW)
