"""Modules beside the layers that travel with an organ: embeddings and heads, whole or some of their rows."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    pipeline,
)

from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    DonorTrainer,
    IncompatibleDonorError,
    MuonWithAdamW,
    NotHFError,
    TransplantedForCausalLM,
    TransplantedForSequenceClassification,
    merge_donor,
)
from not_hf.donor.saved_modules import class_names
from testing.donors import moved, organ, same, tiny_organ
from testing.models import TOKEN_IDS, tiny_config, tiny_model, tiny_tokenizer
from testing.shapes import VOCAB
from testing.training import made, rows

NEW = [VOCAB, VOCAB + 1]
MODELS = ["llama", "gpt2", "gemma3_text", "opt", "phi3"]  # tied and not, with projections around the embeddings


def test_class_names_stand_in_the_order_of_their_numbers():
    config = tiny_config("llama", num_labels=12)
    config.id2label = {str(n): f"class{n}" for n in range(12)}  # as they are read from JSON
    assert class_names(config) == [f"class{n}" for n in range(12)]


@pytest.fixture(params=MODELS)
def model_type(request) -> str:
    return request.param


@pytest.fixture
def base_on_disk(model_type, tmp_path) -> Path:
    """A base on disk, without the new tokens."""
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def extended(folder: Path) -> PreTrainedModel:
    """The base with rows for two more tokens."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    base.resize_token_embeddings(VOCAB + len(NEW), mean_resizing=False)
    return base


def everywhere(base: PreTrainedModel) -> Any:
    """The new rows, of the head too if it has weights of its own."""
    names = {id(module): path.rpartition(".")[2] for path, module in base.named_modules()}
    owners = [base.get_input_embeddings(), base.get_output_embeddings()]
    if owners[0].weight is owners[1].weight:
        return NEW
    return {names[id(owner)]: NEW for owner in owners}


def with_new_tokens() -> list[dict[str, torch.Tensor]]:
    data = rows(8)
    for row in data:
        row["input_ids"][3:5] = row["labels"][3:5] = torch.tensor(NEW)
    return data


@torch.no_grad()
def logits(model: PreTrainedModel, *more: int) -> torch.Tensor:
    return model(torch.cat([TOKEN_IDS, torch.tensor([more, more])], 1) if more else TOKEN_IDS).logits


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Trainer, DonorTrainer])
def test_new_tokens_are_trained_and_travel_with_the_organ(base_on_disk, tmp_path, cls):
    base = extended(base_on_disk)
    donor = DonorModel.from_base(base, (1, 3), mode="replace", trainable_token_indices=everywhere(base))
    model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="new", is_trainable=True)
    before, rest = logits(model, *NEW), base.get_input_embeddings().weight[:VOCAB].clone()
    made(model, tmp_path, with_new_tokens(), cls=cls, weight_decay=0.1, num_train_epochs=1).train()
    model.eval()
    assert torch.equal(base.get_input_embeddings().weight[:VOCAB], rest)
    trained = logits(model, *NEW)
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path / "organ")
    assert {name.partition(".")[0] for name in names_in(tmp_path / "organ")} == {"organ", "token_rows"}

    again = TransplantedForCausalLM.from_pretrained(tmp_path / "organ").eval()  # of the base without these tokens
    assert again.config.vocab_size == again.vocab_size if hasattr(again, "vocab_size") else VOCAB + 2
    torch.testing.assert_close(logits(again, *NEW), trained, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base_on_disk).eval()
    with again.disable_donors():
        assert again.config.vocab_size == VOCAB
        assert torch.equal(logits(again), logits(plain))
    greedy = again.generate(TOKEN_IDS[:1], max_new_tokens=4, do_sample=False)
    merged = again.merge_and_unload()
    assert merged.config.vocab_size == VOCAB + 2
    merged.save_pretrained(tmp_path / "merged")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(native, *NEW), trained, rtol=1e-5, atol=1e-5)
    assert torch.equal(native.generate(TOKEN_IDS[:1], max_new_tokens=4, do_sample=False), greedy)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_whole_modules_travel_with_the_organ(model_type, tmp_path):
    base = tiny_model(model_type)
    base.save_pretrained(tmp_path / "base")
    names = {id(module): path.rpartition(".")[2] for path, module in base.named_modules()}
    is_tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    chosen = [names[id(base.get_input_embeddings())]]
    chosen += [] if is_tied else [names[id(base.get_output_embeddings())]]
    donor = moved(DonorModel.from_base(tmp_path / "base", (1, 3), modules_to_save=chosen), 1)
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "base", donor, is_trainable=True).eval()
    with_organ = logits(model)
    assert model.get_input_embeddings().weight.requires_grad
    with model.disable_donors():
        assert torch.equal(logits(model), logits(base))
    model.save_pretrained(tmp_path / "organ")
    assert f"modules_to_save.{chosen[0]}.weight" in names_in(tmp_path / "organ")
    assert torch.equal(logits(TransplantedForCausalLM.from_pretrained(tmp_path / "organ")), with_organ)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), with_organ)
        tied = copied.get_input_embeddings().weight is copied.get_output_embeddings().weight
        assert tied == is_tied
    restored = model.unload()
    assert torch.equal(logits(restored), logits(base))
    assert all(parameter.requires_grad for parameter in restored.parameters())


def test_a_head_is_cut_from_files_that_hold_only_the_embeddings_it_shares(tmp_path):
    base = tiny_model("llama", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    stored, live = (
        DonorModel.from_base(each, (1, 3), modules_to_save=["lm_head"]) for each in (tmp_path / "base", base)
    )
    assert same(stored, live)
    with pytest.raises(NotHFError, match="lm_head and embed_tokens are or share lm_head; name one of them"):
        DonorModel.from_base(tmp_path / "base", (1, 3), modules_to_save=["embed_tokens", "lm_head"])


@pytest.mark.slow
def test_a_classifier_travels_with_the_organ(tmp_path):
    torch.manual_seed(0)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    labels = {"id2label": {0: "good", 1: "bad", 2: "neither"}, "label2id": {"good": 0, "bad": 1, "neither": 2}}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **labels)
    donor = DonorModel.from_base(base, (1, 3))
    options = {"is_trainable": True, "modules_to_save": ["score"]}
    model = TransplantedForSequenceClassification.from_pretrained(base, donor, **options)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.mul_(3)
    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForSequenceClassification.from_pretrained(tmp_path / "organ")
    assert torch.equal(logits(again), logits(model.eval())) and again.config.id2label == labels["id2label"]
    (found,) = pipeline("text-classification", str(tmp_path / "organ"))("In the beginning")
    assert found["label"] in labels["label2id"]
    assert DonorModel.from_base(model.unload(), (1, 3), modules_to_save=["score"]).config.labels == [
        *labels["label2id"]
    ]
    other = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=4))
    with pytest.raises(IncompatibleDonorError, match=r"score\.weight has shape \(3, 32\).*num_labels=3"):
        TransplantedForSequenceClassification.from_pretrained(other, tmp_path / "organ")
    assert other.score.weight.shape == (4, 32)


@pytest.mark.slow
def test_the_names_of_classes_are_those_of_the_active_classifier(tmp_path):
    def named(*names: str) -> dict:
        return {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}

    load = TransplantedForSequenceClassification.from_pretrained
    AutoModelForSequenceClassification.from_config(tiny_config("llama", **named("yes", "no"))).save_pretrained(
        tmp_path / "base"
    )
    options = {"mode": "replace", "modules_to_save": ["score"]}
    for name, classes in (("mood", named("good", "bad")), ("mail", named("spam", "news"))):
        donor = DonorModel.from_base(load(tmp_path / "base", tiny_organ(1), **classes).unload(), (1, 3), **options)
        assert donor.config.labels == [*classes["label2id"]]
        donor.save_pretrained(tmp_path / name)

    def classes(model: PreTrainedModel) -> list[str]:
        assert model.config.label2id == {name: n for n, name in model.config.id2label.items()}
        return list(model.config.id2label.values())

    model = load(tmp_path / "mood")
    assert classes(model) == ["good", "bad"]
    with model.disable_donors():
        assert classes(model) == ["yes", "no"]
    model.set_donor([])
    model.load_donor(tmp_path / "mail", "mail")
    assert classes(model) == ["spam", "news"]
    model.save_pretrained(tmp_path / "both")
    assert classes(load(tmp_path / "both")) == ["spam", "news"]
    model.set_donor("default")
    assert classes(model) == ["good", "bad"]
    model.hotswap_donor("default", tmp_path / "mail")
    assert classes(model) == ["spam", "news"]
    model.config.id2label, model.config.label2id = named("junk", "rest").values()
    model.set_donor("mail")
    model.set_donor("default")
    assert classes(model) == ["junk", "rest"]
    model.config.id2label, model.config.label2id = named("junk", "mail").values()
    model.save_pretrained(tmp_path / "named", ["default"])
    assert DonorConfig.from_pretrained(tmp_path / "named").labels == ["junk", "mail"]
    assert classes(copy.deepcopy(model).merge_and_unload()) == ["junk", "mail"]
    assert classes(model.unload()) == ["yes", "no"]
    more = {"modules_to_save": ["embed_tokens"], "is_trainable": True}
    assert classes(load(model, tmp_path / "mood", **more)) == ["good", "bad"]  # a live base
    assert classes(load(tmp_path / "base", tmp_path / "mood", num_labels=2)) == ["good", "bad"]
    assert classes(load(tmp_path / "base", tmp_path / "mood", **named("+", "-"))) == ["+", "-"]  # the caller's choice


def test_an_organ_that_is_loaded_may_get_modules(tmp_path):
    base = tiny_model("llama")
    organ(base, 1).save_pretrained(tmp_path / "organ")
    options = {"is_trainable": True, "modules_to_save": ["norm", "lm_head"], "trainable_token_indices": [5, 7]}
    model = TransplantedForCausalLM.from_pretrained(base, tmp_path / "organ", donor_name="a", **options)
    assert model.donor_config["a"].modules_to_save == ["norm", "lm_head"]
    assert model.donor_config["a"].trainable_token_indices == {"embed_tokens": [5, 7]}
    assert model.get_donor_status()["a"].modules_to_save == ["norm", "lm_head", "embed_tokens"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    outside = {"model.norm.weight", "lm_head.weight", "model.embed_tokens.token_rows"}
    assert trained - outside == {name for name in trained if ".layers." in name} and outside <= trained
    assert torch.equal(
        logits(model),
        logits(TransplantedForCausalLM.from_pretrained(tiny_model("llama"), organ(tiny_model("llama"), 1))),
    )
    model.save_pretrained(tmp_path / "more")
    config = DonorConfig.from_pretrained(tmp_path / "more")
    assert config.modules_to_save == ["norm", "lm_head"]
    assert "`norm`, `lm_head`" in (tmp_path / "more" / "README.md").read_text()


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("chosen", [[6, 8], [8], [8, 5, 6, 8]])
def test_rows_are_held_besides_those_of_the_donor(chosen, is_trainable, tmp_path):
    base = tiny_model("llama")
    donor = organ(base, 1, trainable_token_indices=[6, 5])
    expected = base.model.embed_tokens.weight.detach().clone()
    expected[[6, 5]] = donor.token_rows.embed_tokens.weight.detach()
    options = {"trainable_token_indices": chosen, "is_trainable": is_trainable}
    model = TransplantedForCausalLM.from_pretrained(base, donor, **options)
    assert model.donor_config["default"].trainable_token_indices == {"embed_tokens": [6, 5, 8]}
    assert torch.equal(model.model.embed_tokens(torch.arange(VOCAB)), expected)
    model.save_pretrained(tmp_path)
    held = DonorModel.from_pretrained(tmp_path).token_rows.embed_tokens.weight
    assert torch.equal(held, expected[[6, 5, 8]])


def test_token_ids_are_chosen_once(tmp_path):
    base, new = tiny_model("llama"), [VOCAB, VOCAB + 1]
    donor = DonorModel.from_base(base, (1, 3), trainable_token_indices=[5, 5])
    assert donor.config.trainable_token_indices == {"embed_tokens": [5]}
    donor.save_pretrained(tmp_path)
    for none in ([], {"embed_tokens": ()}):
        with pytest.raises(NotHFError, match="of embed_tokens must be ids of tokens, got none"):
            TransplantedForCausalLM.from_pretrained(base, donor, trainable_token_indices=none)
    base.resize_token_embeddings(VOCAB + 2)
    grown = DonorModel.from_base(base, (1, 3), trainable_token_indices={"embed_tokens": new, "lm_head": new})
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), grown, trainable_token_indices=[new[0], 3])
    assert model.donor_config["default"].trainable_token_indices == {"embed_tokens": [*new, 3], "lm_head": new}


def test_master_weights_of_modules(tmp_path):
    base = tiny_model("llama").bfloat16()
    donor = DonorModel.from_base(base, (1, 3), modules_to_save=["lm_head"], trainable_token_indices=[3])
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.token_rows.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    model(TOKEN_IDS, labels=TOKEN_IDS).loss.backward()
    assert model.lm_head.weight.grad.dtype == model.model.embed_tokens.token_rows.grad.dtype == torch.float32
    with_organ = logits(model)
    native = model.merge_and_unload()
    assert native.lm_head.weight.dtype == torch.bfloat16 and type(native.lm_head) is torch.nn.Linear
    assert torch.equal(logits(native), with_organ)


@pytest.mark.parametrize("active", ["b", "a"], ids=["in the stack", "parked"])
def test_embeddings_with_master_weights_follow_a_cast(active):
    base = tiny_model("gpt2").bfloat16()
    model = TransplantedForCausalLM.from_pretrained(base, tiny_organ(1, "gpt2"), donor_name="a")
    model.load_donor(tiny_organ(2, "gpt2"), "b", position=0, is_trainable=True, modules_to_save=["wte"])
    moved(model.transformer.wte, 1)
    model.set_donor(active)
    model.float()
    model.set_donor("b")
    embeddings = model.transformer.wte
    assert embeddings(TOKEN_IDS).dtype == logits(model).dtype == torch.float32
    assert torch.equal(embeddings(TOKEN_IDS), embeddings.weight[TOKEN_IDS])


@pytest.mark.slow
def test_the_best_checkpoint_brings_its_modules_back(tmp_path):
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (1, 3), modules_to_save=["lm_head"], trainable_token_indices=[3])
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    options = {"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = made(model, tmp_path, eval_dataset=rows(4, seed=5), **options, learning_rate=0.3)
    trainer.train()
    best = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), trainer.state.best_model_checkpoint)
    assert torch.equal(logits(best.eval()), logits(model.eval()))
    last = tmp_path / "run" / f"checkpoint-{trainer.state.global_step}"
    last = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), last)
    assert not torch.equal(logits(last), logits(best))


@pytest.mark.slow
def test_swapping_and_deleting(tmp_path):
    base, held = tiny_model("llama"), {"modules_to_save": ["lm_head"], "trainable_token_indices": [3]}
    one, two = (organ(base, seed, **held) for seed in (1, 2))
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), one, donor_name="a")
    fresh = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), two, donor_name="b")
    model.hotswap_donor("a", two)
    assert torch.equal(logits(model), logits(fresh))
    with pytest.raises(IncompatibleDonorError, match=r"modules beside the layers.*lm_head"):
        model.hotswap_donor("a", organ(base, 3))
    with pytest.raises(IncompatibleDonorError, match=r"rows of \{'embed_tokens': \[4\]\}, not .*3"):
        model.hotswap_donor("a", organ(base, 3, **held | {"trainable_token_indices": [4]}))
    with pytest.raises(IncompatibleDonorError, match=r"'a' and 'c' both hold lm_head; choose one with set_donor"):
        model.load_donor(organ(base, 3, layers=(3, 4), modules_to_save=["lm_head"]), "c")
    assert list(model.donor_config) == ["a"] and torch.equal(logits(model), logits(fresh))
    model.load_donor(organ(base, 3, layers=(3, 4)), "c")
    with pytest.raises(NotHFError, match="resize the recipient before organs"):
        model.resize_token_embeddings(VOCAB + 1)
    model.delete_donor("a")
    model.resize_token_embeddings(VOCAB + 1)  # no other organ has such modules
    model.resize_token_embeddings(VOCAB)
    assert torch.equal(
        logits(model), logits(TransplantedForCausalLM.from_pretrained(tiny_model("llama"), organ(base, 3, (3, 4))))
    )


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path):
    base = tiny_model("llama")
    for names, said in (
        (["nothing"], "no module 'nothing' beside its layers; it has model.embed_tokens, model.norm, lm_head"),
        (["q_proj"], "no module 'q_proj'"),
        ("lm_head", "must be a list of names"),
    ):
        with pytest.raises(NotHFError, match=said):
            DonorModel.from_base(base, (1, 3), modules_to_save=names)
    with pytest.raises(NotHFError, match=r"\[96\] are not rows of embed_tokens, which has 96 rows; call resize_token"):
        DonorModel.from_base(base, (1, 3), trainable_token_indices=[96])
    with pytest.raises(NotHFError, match="embed_tokens and embed_tokens"):
        DonorModel.from_base(base, (1, 3), modules_to_save=["embed_tokens"], trainable_token_indices=[3])
    grown = tiny_model("llama")
    grown.resize_token_embeddings(VOCAB + 2)
    donor = DonorModel.from_base(grown, (1, 3), trainable_token_indices=NEW)
    before = logits(base)
    with pytest.raises(IncompatibleDonorError, match="98 tokens for the embeddings, 96 for the head; name both"):
        TransplantedForCausalLM.from_pretrained(base, donor)
    assert type(base).__name__ == "LlamaForCausalLM" and torch.equal(logits(base), before)
    donor = DonorModel.from_base(base, (1, 3), modules_to_save=["lm_head"])
    donor.save_pretrained(tmp_path / "organ")
    donor.config.modules_to_save = ["norm"]
    donor.config.save_pretrained(tmp_path / "organ")
    with pytest.raises(
        CorruptDonorError, match=r"missing modules_to_save\.norm\..*unexpected modules_to_save\.lm_head"
    ):
        DonorModel.from_pretrained(tmp_path / "organ")
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3), modules_to_save=["norm"]))
    with pytest.raises(NotHFError, match="resize the recipient before organs are loaded"):
        model.resize_token_embeddings(VOCAB + 5)


@pytest.mark.slow
def test_a_composition_keeps_the_modules_of_its_organs(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = TransplantedForCausalLM.from_pretrained(
        tmp_path / "base", organ(tmp_path / "base", 1, modules_to_save=["norm"]), donor_name="a"
    )
    model.load_donor(organ(tmp_path / "base", 2, (2, 4), trainable_token_indices=[4, 5]), "b")
    both = logits(model)
    model.set_donor("b")
    alone = logits(model)
    model.set_donor(["a", "b"])
    assert torch.equal(logits(model), both) and not torch.equal(alone, both)
    model.save_pretrained(tmp_path / "two")
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(again), both)
    again.set_donor("b")
    assert torch.equal(logits(again), alone)
    assert (
        merge_donor(tmp_path / "two", tmp_path / "merged").built_because == "an organ holds modules beside its layers"
    )
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), both)


@pytest.mark.slow
def test_an_organ_with_new_tokens_and_their_tokenizer_on_the_hub(base_repo, api, tmp_path):
    repo = base_repo("llama")
    tokenizer = AutoTokenizer.from_pretrained(repo)
    tokenizer.add_tokens(["<new>", "<other>"])
    base = AutoModelForCausalLM.from_pretrained(repo)
    base.resize_token_embeddings(len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(["<new>", "<other>"])
    donor = organ(base, 1, modules_to_save=["lm_head"], trainable_token_indices=ids)
    model = TransplantedForCausalLM.from_pretrained(base, donor).eval()
    model.push_to_hub("me/tiny-new-tokens")
    tokenizer.push_to_hub("me/tiny-new-tokens")
    api.repo_info("me/tiny-new-tokens")
    pipe = pipeline("text-generation", "me/tiny-new-tokens")
    assert len(pipe.tokenizer) == pipe.model.config.vocab_size == len(tokenizer)
    prompt = "w5 <new> w7 <other>"
    assert set(ids) <= set(pipe.tokenizer(prompt)["input_ids"])
    encoded = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(pipe.model(encoded).logits, model(encoded).logits)
    assert pipe(prompt, max_new_tokens=3)[0]["generated_text"].startswith("w5")


@pytest.mark.parametrize("key", ["__class__", "forward", "weight.more", "a..b", ""])
def test_names_that_no_module_can_have_are_refused(key, tmp_path):
    DonorModel.from_base(tiny_model("llama"), (1, 3), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, f"modules_to_save.lm_head.{key}": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptDonorError, match=r"unexpected modules_to_save\.lm_head\."):
        DonorModel.from_pretrained(tmp_path)


@pytest.mark.slow
def test_what_is_cached_below_an_organ_needs_frozen_embeddings(tmp_path):
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (2, 3), mode="replace", trainable_token_indices=[3])
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    with pytest.raises(NotHFError, match=r"needs everything below the organ frozen, but model\.embed_tokens"):
        made(model, tmp_path, cache_prefix=True).train()


def test_muon_leaves_rows_to_adamw():
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (2, 3), modules_to_save=["lm_head"], trainable_token_indices=[3])
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    muon, *_ = MuonWithAdamW()(model, lr=1e-3, weight_decay=0.1).param_groups
    outer = {id(model.lm_head.weight), id(model.model.embed_tokens.token_rows)}
    assert muon["optimizer"] == "muon" and not outer & set(map(id, muon["params"]))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_rows_in_a_compiled_model(token_ids):
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (1, 3), trainable_token_indices=[*range(3, 40)])
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    plain = model(token_ids, labels=token_ids).loss
    compiled = torch.compile(model, backend="aot_eager")(token_ids, labels=token_ids).loss
    torch.testing.assert_close(compiled, plain)
    compiled.backward()
    assert model.model.embed_tokens.token_rows.grad.abs().sum() > 0


def test_a_donor_without_values_of_its_modules_takes_the_recipients_and_is_not_saved(tmp_path):
    base = tiny_model("llama")
    config = DonorModel.from_base(base, (1, 3), modules_to_save=["lm_head"]).config
    fresh = DonorModel(config)
    with pytest.raises(CorruptDonorError, match=r"cannot save to .*: missing modules_to_save\.lm_head\."):
        fresh.save_pretrained(tmp_path / "organ")
    assert not (tmp_path / "organ").exists()
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), fresh)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_a_module_that_stands_keeps_its_mode():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1, modules_to_save=["lm_head"]), donor_name="a")
    model.train()
    model.lm_head.eval()
    model.load_donor(organ(tiny_model("llama"), 2, (3, 4)), "b")
    assert not model.lm_head.training and model.model.layers[0].training
