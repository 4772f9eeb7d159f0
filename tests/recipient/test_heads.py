"""Heads other than those of language models: the same organ, by the same engine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import not_hf
from not_hf import DonorModel, NotHFError, UnsupportedArchitectureError
from not_hf.architecture.upstream import native_classes
from testing.donors import moved, organ, same
from testing.models import TOKEN_IDS, tiny_config, tiny_model, tiny_tokenizer
from testing.shapes import HEADED, exhaustive

HEADS = {
    name: getattr(not_hf, name)
    for name in (
        "TransplantedForSequenceClassification",
        "TransplantedForTokenClassification",
        "TransplantedForQuestionAnswering",
        "TransplantedModel",
    )
}
PAIRS = [
    (model_type, name)
    for model_type in HEADED
    for name, kind in HEADS.items()
    if native_classes(kind.native_auto_class, tiny_config(model_type))
]


def headed(kind: Any, model_type: str) -> PreTrainedModel:
    """The tiny language model of that type with another head, whose values are random."""
    torch.manual_seed(7)
    labels = {} if "QuestionAnswering" in kind.__name__ else {"num_labels": 3}
    model = kind.native_auto_class.from_config(tiny_config(model_type, **labels)).eval()
    model.base_model.load_state_dict(tiny_model(model_type).base_model.state_dict(), strict=False)
    return model


@torch.no_grad()
def scores(model: torch.nn.Module) -> torch.Tensor:
    """The first output of a model: scores, or hidden states."""
    return model(TOKEN_IDS)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], Path]:
    """The folder of `headed`, with a tokenizer."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: Any, model_type: str) -> Path:
        key = (kind.__name__, model_type)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("headed")
            headed(kind, model_type).save_pretrained(made[key])
            tiny_tokenizer().save_pretrained(made[key])
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "name"), [pytest.param(*pair, marks=exhaustive(pair[0])) for pair in PAIRS])
def test_an_organ_of_a_language_model_lives_under_another_head(model_type, name, folder, tmp_path):
    kind, base = HEADS[name], folder(HEADS[name], model_type)
    donor = organ(tiny_model(model_type), 1)
    native = kind.native_auto_class.from_pretrained(base)
    bare, class_, tensors = scores(native), type(native), copy.deepcopy(native.state_dict())
    model = kind.from_pretrained(native, donor, donor_name="kjv")
    assert isinstance(model, kind) and isinstance(model, class_) and model.config.num_hidden_layers == 6
    expected = scores(model)
    assert not torch.equal(expected, bare)
    with model.disable_donors():
        assert torch.equal(scores(model), bare)

    model.save_pretrained(tmp_path / "organ")
    assert torch.equal(scores(kind.from_pretrained(tmp_path / "organ")), expected)
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), donor)

    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is class_
    merged.save_pretrained(tmp_path / "merged")
    again = kind.native_auto_class.from_pretrained(tmp_path / "merged")
    assert type(again) is class_ and torch.equal(scores(again), expected)
    assert type(model.unload()) is class_ and same(model, tensors)


@pytest.mark.parametrize(("model_type", "name"), [pair for pair in PAIRS if pair[1] != "TransplantedModel"][:3])
def test_the_auto_class_loads_it_by_id(model_type, name, folder, tmp_path):
    kind, base = HEADS[name], folder(HEADS[name], model_type)
    model = kind.from_pretrained(base, moved(DonorModel.from_base(base, (1, 3)), 1))
    model.save_pretrained(tmp_path)
    again = kind.native_auto_class.from_pretrained(tmp_path)
    assert isinstance(again, kind) and torch.equal(scores(again), scores(model))
    assert type(AutoModel.from_pretrained(tmp_path)) is DonorModel


@pytest.mark.slow
def test_an_organ_cut_under_one_head_fits_another(folder, tmp_path):
    """Cut from a folder or a live model, with a head or without: the same layers, and the same donor."""
    lm = tiny_model("llama")
    lm.save_pretrained(tmp_path / "lm")
    expected = DonorModel.from_base(tmp_path / "lm", (1, 3))
    for kind in HEADS.values():
        for base in (headed(kind, "llama"), folder(kind, "llama")):
            donor = DonorModel.from_base(base, (1, 3))
            assert same(donor, expected)
            assert torch.equal(
                scores(not_hf.TransplantedForCausalLM.from_pretrained(copy.deepcopy(lm), donor)),
                scores(not_hf.TransplantedForCausalLM.from_pretrained(copy.deepcopy(lm), expected)),
            )


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["organ", "organ and head"])
def test_trainer_trains_a_classifier(trained, folder, tmp_path):
    kind = HEADS["TransplantedForSequenceClassification"]
    base = folder(kind, "llama")
    model = kind.from_pretrained(base, DonorModel.from_base(base, (1, 3)), is_trainable=True)
    model.score.requires_grad_(trained == "organ and head")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = [{"input_ids": row.tolist(), "labels": n % 3} for n, row in enumerate(TOKEN_IDS.repeat(4, 1))]
    options = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True}
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path / "run", max_steps=3, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    changed = {
        key.split(".")[0] + key.partition("layers.")[2][:1]
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed == {"model3", "model4"} | ({"score"} if trained == "organ and head" else set())
    trainer.save_model(tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ").stack.layers, model.model.layers[3:5])


@pytest.mark.slow
def test_pipelines_take_them_by_id_and_log_no_warning(folder, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    tasks = {
        "text-classification": "TransplantedForSequenceClassification",
        "token-classification": "TransplantedForTokenClassification",
    }
    for task, name in tasks.items():
        base = folder(HEADS[name], "llama")
        model = HEADS[name].from_pretrained(base, moved(DonorModel.from_base(base, (1, 3)), 1))
        model.save_pretrained(tmp_path / task)
        caplog.clear()  # a card that names no base on the Hub is told once in a process
        pipe = pipeline(task, model=str(tmp_path / task), device="cpu")
        assert isinstance(pipe.model, HEADS[name])
        found, expected = pipe("w3 w5"), pipeline(task, model=model, tokenizer=pipe.tokenizer, device="cpu")("w3 w5")
        assert found == expected and found[0].keys() & {"label", "entity"}
        assert not caplog.records
    base = folder(HEADS["TransplantedModel"], "bert")
    model = HEADS["TransplantedModel"].from_pretrained(base, organ(base, 1))
    (states,) = pipeline("feature-extraction", model=model, tokenizer=AutoTokenizer.from_pretrained(base))("w3 w5")
    assert len(states[0]) == 32
    assert not caplog.records


def test_a_model_with_another_head_is_refused():
    causal, classifier = tiny_model("llama"), headed(HEADS["TransplantedForSequenceClassification"], "llama")
    donor = organ(causal, 1)
    with pytest.raises(
        NotHFError, match="ForCausalLM takes a LlamaForCausalLM, not a LlamaForSequenceClassification; "
    ):
        not_hf.TransplantedForCausalLM.from_pretrained(classifier, donor)
    with pytest.raises(
        NotHFError, match="SequenceClassification takes a LlamaForSequenceClassification, not a LlamaFor"
    ):
        not_hf.TransplantedForSequenceClassification.from_pretrained(causal, donor)
    with pytest.raises(NotHFError, match="TransplantedModel takes a LlamaModel, not a LlamaForCausalLM"):
        not_hf.TransplantedModel.from_pretrained(causal, donor)
    assert type(causal).__name__ == "LlamaForCausalLM" and causal.config.num_hidden_layers == 4


def test_a_head_that_transformers_does_not_have_is_refused(tmp_path):
    base = tiny_model("olmo2")
    base.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="no AutoModelForQuestionAnswering for model_type 'olmo2'"):
        not_hf.TransplantedForQuestionAnswering.from_pretrained(tmp_path, organ(base, 1))


@pytest.mark.parametrize(
    ("auto_class", "model_type"), [(AutoModelForCausalLM, "llama"), (AutoModelForMaskedLM, "bert")]
)
def test_a_new_head_on_the_base_of_a_language_model(auto_class, model_type, tmp_path, caplog):
    """transformers warns that the head is new, as for any base."""
    tiny_model(model_type).save_pretrained(tmp_path)
    donor = organ(tiny_model(model_type), 1)
    model = HEADS["TransplantedForSequenceClassification"].from_pretrained(tmp_path, donor, num_labels=5)
    assert model.config.num_labels == 5 and scores(model).shape == (2, 5)
    assert auto_class.from_pretrained(tmp_path).config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("auto_class", "chosen", "num_trained"),
    [
        (AutoModelForSequenceClassification, {"modules_to_save": ["score"], "num_labels": 3}, 3),
        (AutoModelForCausalLM, {"trainable_token_indices": [5, 7]}, 2),
    ],
)
def test_modules_beside_the_layers_are_chosen_in_the_auto_classes_too(auto_class, chosen, num_trained, tmp_path):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    organ(tmp_path / "base", 1).save_pretrained(tmp_path / "organ")
    model = auto_class.from_pretrained(tmp_path / "organ", is_trainable=True, **chosen)
    layers = sum(parameter.numel() for parameter in base.model.layers[1:3].parameters())
    assert model.num_parameters(only_trainable=True) - layers == num_trained * 32


def test_donor_trainer_is_for_language_models():
    with pytest.raises(NotHFError, match="needs a language model, got LlamaForSequenceClassification; use Trainer"):
        not_hf.DonorTrainer(headed(HEADS["TransplantedForSequenceClassification"], "llama"))


def test_sentence_transformers_loads_a_merged_model(folder, tmp_path):
    """It pools the hidden states of the base model, here by their mean."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base = folder(HEADS["TransplantedModel"], "bert")
    model = HEADS["TransplantedModel"].from_pretrained(base, organ(base, 1))
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(["w3 w5 w7"]).input_ids)
    expected = model(ids).last_hidden_state.mean(1)
    model.merge_and_unload().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    found = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(["w3 w5 w7"])
    torch.testing.assert_close(torch.tensor(found), expected)
