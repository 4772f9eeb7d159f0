"""Spans ranked by the gradients of a few batches, in a model that is given back as it was."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from datasets import Dataset

from not_hf import DonorModel, NotHFError, UnsupportedArchitectureError, choose_span
from not_hf.training import span_choice as spans
from not_hf.training.data import pack
from testing.donors import transplanted
from testing.models import tiny_model, tiny_tokenizer

IDS = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(3))


def rows(ids: torch.Tensor = IDS) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def by_hand(model: torch.nn.Module, ids: torch.Tensor, batch_size: int) -> list[float]:
    """Each layer's E[g]^2 / sqrt(E[g^2]) with every gradient held, and E[g]^2 from every pair of two batches."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    gradients = []
    for part in ids.split(batch_size):
        model.zero_grad()
        model(part, labels=part).loss.backward()
        gradients.append([[p.grad.double() for p in layer.parameters()] for layer in model.model.layers])
    pairs = list(itertools.permutations(range(len(gradients)), 2))
    scores = []
    for layer in zip(*gradients, strict=True):
        score = 0.0
        for tensors in zip(*layer, strict=True):
            squared_mean = sum(tensors[a] * tensors[b] for a, b in pairs) / len(pairs)
            score += float((squared_mean / torch.stack(tensors).square().mean(0).sqrt()).sum())
        scores.append(score)
    return scores


def everything(model: torch.nn.Module) -> list:
    """What a call must give back."""
    tensors = [(p.requires_grad, p.data_ptr(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    hooks = [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return [tensors, hooks, modes, torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}]


def same(before, after) -> bool:
    if isinstance(before, torch.Tensor):
        return isinstance(after, torch.Tensor) and torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after


def busy_model() -> torch.nn.Module:
    """In train mode but for a layer, part frozen, with gradients of its own, and with dropout."""
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[2].eval()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    model(IDS[:1], labels=IDS[:1]).loss.backward()
    return model


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_span_by_its_gradient(k):
    model = busy_model()
    before = everything(model)
    ranked = choose_span(model, rows(), k, num_batches=3, batch_size=4)
    assert same(before, everything(model))
    layers = by_hand(model, IDS, 4)
    expected = {(i, i + k): sum(layers[i : i + k]) for i in range(5 - k)}
    assert [span.layers for span in ranked] == sorted(expected, key=expected.__getitem__, reverse=True)
    assert [span.score for span in ranked] == pytest.approx(sorted(expected.values(), reverse=True), rel=1e-4)


def test_what_is_read_of_the_data():
    model, options = tiny_model("llama"), {"k": 2, "num_batches": 2, "batch_size": 2}
    spread = choose_span(model, rows(), **options)  # rows 0, 3, 6 and 9
    assert spread == choose_span(model, rows(IDS[::3]), **options)
    assert spread == choose_span(model, [{"input_ids": row, "name": "x"} for row in IDS], **options)
    assert spread == choose_span(model, rows(IDS[::3]).to_iterable_dataset(), **options)
    first = choose_span(model, rows().to_iterable_dataset(), **options)  # rows 0 to 3
    assert first == choose_span(model, rows(IDS[:4]), **options) != spread
    packed = [{"input_ids": row, "position_ids": torch.arange(16) % 5} for row in IDS[::3]]
    assert choose_span(model, packed, **options) != spread
    uneven = [{"input_ids": row[: 8 + n]} for n, row in enumerate(IDS)]
    assert len(choose_span(model, uneven, 2, num_batches=3, batch_size=1)) == 3
    text = pack(Dataset.from_dict({"text": ["w4 w5 w6 w7 w8 w9"] * 8}), tiny_tokenizer(), 8)
    assert len(choose_span(model, text, 2)) == 3  # fewer rows than asked for


def test_no_two_tensors_gradients_are_held(monkeypatch):
    model, held = tiny_model("llama"), []
    stride = spans._stride

    def watched(parameter):
        held.append(sum(p.grad is not None for p in model.parameters()))
        return stride(parameter)

    monkeypatch.setattr(spans, "_stride", watched)
    choose_span(model, rows(), 2)
    assert max(held) == 1


def test_a_sample_of_entries_stands_for_all(monkeypatch):
    ids = IDS[:1].repeat(12, 1)
    ids[:, -1] = IDS[:, -1]
    alike = rows(ids)  # so that gradients are more than noise
    exact = {span.layers: span.score for span in choose_span(tiny_model("llama"), alike, 1)}
    monkeypatch.setattr(spans, "_MAX_ENTRIES", 200)
    weight = torch.zeros(48, 32)
    columns = torch.arange(weight.numel())[:: spans._stride(weight)] % 32
    assert len(columns) == 220 and len(columns.unique()) == 32  # every 7th entry, from every column
    sampled = {span.layers: span.score for span in choose_span(tiny_model("llama"), alike, 1)}
    assert sampled != exact and sampled == pytest.approx(exact, rel=0.3)


def test_a_folder_and_a_donor(base_folder, tmp_path):
    plain = choose_span(tiny_model("llama"), rows(), 2)
    assert choose_span(base_folder("llama"), rows(), 2) == plain
    DonorModel.from_base(base_folder("llama"), (1, 3)).save_pretrained(tmp_path)
    assert choose_span(str(tmp_path), rows(), 2) == plain


def test_organs_are_off_and_then_on_again():
    model = transplanted(("a", DonorModel.from_base(tiny_model("llama", seed=5), (0, 2)), {"is_trainable": True}))
    before = everything(model)
    assert choose_span(model, rows(), 2) == choose_span(tiny_model("llama"), rows(), 2)
    assert model.active_donors == ["a"] and len(model.model.layers) == 6 and same(before, everything(model))


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", "gpt_oss"])
def test_other_architectures(model_type):
    ranked = choose_span(tiny_model(model_type), rows(), 2)
    assert sorted(span.layers for span in ranked) == [(0, 2), (1, 3), (2, 4)]
    assert len({span.score for span in ranked}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k must be between 1 and 4, the number of layers, got 5"),
        ({"k": 0}, "k must be between 1 and 4, the number of layers, got 0"),
        ({"num_batches": 1}, "num_batches must be at least 2 and batch_size at least 1, got 1 and 2"),
        ({"batch_size": 20}, "data fills fewer than 2 batches of 20 rows; use more rows, or a smaller batch_size"),
        ({"data": []}, "data has no rows with input_ids; use not_hf.pack to make them"),
        ({"data": ["text"]}, "data has no rows with input_ids"),
        (
            {"data": [{"input_ids": IDS[0]}, {"input_ids": IDS[0, :9]}]},
            "a batch has rows of 9 and 16 tokens; use not_hf.pack",
        ),
        (
            {"data": [{"input_ids": [1, 2], "labels": [-100, -100]}] * 4},
            "the gradient is zero or not finite",
        ),
        (
            {"data": [{"input_ids": [1, 2, 3]}] * 3 + [{"input_ids": [1, 2, 1000]}]},
            "index out of range",
        ),  # not ours, in the midst of the pass
    ],
)
def test_what_is_refused_changes_nothing(arguments, message):
    model = busy_model()
    before = everything(model)
    with pytest.raises(IndexError if message.startswith("index") else NotHFError, match=message):
        choose_span(**{"model": model, "data": rows(), "k": 2, **arguments})
    assert same(before, everything(model))


def test_a_gradient_past_all_numbers():
    model = tiny_model("llama").half()
    model.lm_head.weight.data.fill_(6e4)
    with pytest.raises(NotHFError, match="zero or not finite; check the labels, and load the model in bfloat16"):
        choose_span(model, rows(), 2)


def test_models_that_cannot_be_ranked():
    with pytest.raises(UnsupportedArchitectureError, match="model_type 'bert' is an encoder; use a causal LM"):
        choose_span(tiny_model("bert"), rows(), 2)
    with pytest.raises(
        UnsupportedArchitectureError, match="offloaded weights take no gradient; load the model without"
    ):
        choose_span(tiny_model("llama").to("meta"), rows(), 2)
    packed = tiny_model("llama")
    packed.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(
        UnsupportedArchitectureError, match="weights in 8 bit take no gradient; load the model without"
    ):
        choose_span(packed, rows(), 2)
