"""What the prefix cache holds is of the model as it is: a change below the organ is noticed, or the cache is off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM, TransplantedForMaskedLM
from testing.donors import moved
from testing.models import tiny_model
from testing.releases import since
from testing.training import losses, made, recipient, rows

pytestmark = pytest.mark.slow


def two_organs() -> TransplantedForCausalLM:
    """A frozen organ below a trainable one."""
    low = moved(DonorModel.from_base(tiny_model("llama"), (0, 1)), 1)
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), low, donor_name="low", position=0)
    model.load_donor(DonorModel.from_base(tiny_model("llama"), (2, 4)), "top", position=3, is_trainable=True)
    return model


@torch.no_grad()
def doubled(model: Any) -> None:
    model.get_input_embeddings().weight.mul_(2)


def doubled_as_data(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data.mul_(2)


def replaced_module(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.o_proj = nn.Linear(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)


def replaced_embeddings(model: Any) -> None:
    torch.manual_seed(3)
    model.set_input_embeddings(nn.Embedding(*model.get_input_embeddings().weight.shape).requires_grad_(False))


def other_attribute(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


CHANGES: list[Callable[[Any], None]] = [
    lambda model: model.set_donor_scale("low", 0.5),
    lambda model: model.hotswap_donor("low", moved(DonorModel.from_base(tiny_model("llama"), (0, 1)), 2)),
    doubled,
    doubled_as_data,
    lambda model: replaced_module(model.requires_grad_(False)),
    replaced_embeddings,
    other_attribute,
    lambda model: model.set_attn_implementation("eager"),
]


@pytest.mark.parametrize(
    "change", CHANGES, ids=["scale", "hotswap", "in place", "data", "module", "embeddings", "attribute", "attention"]
)
def test_an_evaluation_after_a_change_below_the_organ(change, tmp_path):
    model, options = two_organs(), {"eval_dataset": rows(4)}
    cached, plain = made(model, tmp_path, cache_prefix=True, **options), made(model, tmp_path, cls=Trainer, **options)
    before = cached.evaluate()["eval_loss"]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    change(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    key = cached._stack.prefix.store.key
    assert cached.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)
    assert cached._stack.prefix.store.key != key
    if change not in CHANGES[-1:]:
        assert abs(cached.evaluate()["eval_loss"] - before) > 1e-4


class Change(TrainerCallback):
    """Changes a model during its training."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in (3, 5):
            self.change(model)


@pytest.mark.parametrize("change", [doubled, lambda model: model.set_donor_scale("low", 0.5)], ids=["bytes", "scale"])
def test_a_change_during_a_training(change, tmp_path):
    found = []
    for cache in (False, True):
        trainer = made(two_organs(), tmp_path / str(cache), cache_prefix=cache, callbacks=[Change(change)])
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_a_layer_that_becomes_trainable_during_a_training(tmp_path):
    """Hidden states are no longer taken from behind it, and it learns."""

    def unfreeze(model: Any) -> None:
        model.model.layers[1].requires_grad_(True)

    found = []
    for cache in (False, True):
        model = recipient(span=(3, 4))
        before = model.model.layers[1].mlp.up_proj.weight.clone()
        trainer = made(model, tmp_path / str(cache), cache_prefix=cache, callbacks=[Change(unfreeze)])
        trainer.create_optimizer()  # with the layer's parameters, which have no gradients yet
        trainer.optimizer.add_param_group({"params": list(model.model.layers[1].parameters())})
        trainer.train()
        assert trainer._stack.entry == 1 and not torch.equal(model.model.layers[1].mlp.up_proj.weight, before)
        found.append(losses(trainer))
    assert found[0] == found[1]


def with_adapters(active: str | None) -> PeftModel:
    """Two frozen adapters below a trainable organ, of which that one acts."""
    lora = LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1], init_lora_weights=False
    )
    model = recipient()
    torch.manual_seed(5)
    model = get_peft_model(model, copy.deepcopy(lora))
    model.add_adapter("second", copy.deepcopy(lora))
    if active is None:
        model.base_model.disable_adapter_layers()
    else:
        model.set_adapter(active)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2." in name)
    return model


def scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)


def test_each_state_of_adapters_below_has_a_cache_of_its_own(tmp_path):
    keys = []
    for active in ("default", "second", None, "default"):
        models = [with_adapters(active) for _ in range(2)]
        trainers = [
            made(model, tmp_path, cache_prefix=cache, prefix_dir=tmp_path / "prefixes", max_steps=2)
            for model, cache in zip(models, (True, False), strict=True)
        ]
        for trainer in trainers:
            trainer.train()
        assert losses(trainers[0]) == losses(trainers[1])
        keys.append(trainers[0]._stack.prefix.store.key)
    assert keys[0] == keys[3] and len(set(keys)) == 3


@since("peft", "0.21", "`disable_adapter` makes the original module trainable")
def test_adapters_that_replace_a_module_count_too(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], layers_to_transform=[2], modules_to_save=["embed_tokens"])
    model = get_peft_model(recipient(), lora)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2." in name)
    options = {"eval_dataset": rows(4)}
    cached, plain = made(model, tmp_path, cache_prefix=True, **options), made(model, tmp_path, cls=Trainer, **options)
    found = [cached.evaluate()["eval_loss"]]
    with model.disable_adapter():
        found.append(cached.evaluate()["eval_loss"])
        assert found[1] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)
    assert abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize(
    "change", [scaled, lambda model: model.base_model.disable_adapter_layers(), lambda m: m.base_model.merge_adapter()]
)
def test_adapters_that_change_between_evaluations(change, tmp_path):
    model, options = with_adapters("default"), {"eval_dataset": rows(4)}
    cached, plain = made(model, tmp_path, cache_prefix=True, **options), made(model, tmp_path, cls=Trainer, **options)
    cached.evaluate()
    key = cached._stack.prefix.store.key
    change(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2." in name)
    assert cached.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5)
    assert cached._stack.prefix.store.key != key


def steer(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 1.5


def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
    embeddings = module.embed_tokens(kwargs["input_ids"]) * 1.5
    return args, {**kwargs, "input_ids": None, "inputs_embeds": embeddings}


def everywhere(model: Any) -> Callable[[], Any]:
    first = model.model.layers[0].mlp
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.5 if module is first else None
    ).remove


def patched(model: Any) -> Callable[[], Any]:
    first = model.model.layers[0].mlp
    first.forward = lambda hidden: type(first).forward(first, hidden) * 2
    return lambda: vars(first).pop("forward")


HOOKS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "steer on model.layers.1.mlp": lambda model: model.model.layers[1].mlp.register_forward_hook(steer).remove,
    "on every module": everywhere,
    "patched.<locals>.<lambda> on model.layers.0.mlp": patched,
    "before on model": lambda model: model.model.register_forward_pre_hook(before, with_kwargs=True).remove,
}


@pytest.mark.parametrize("where", HOOKS)
def test_a_hook_that_cannot_be_followed_turns_the_cache_off_and_says_so(where, tmp_path, caplog):
    model, options = recipient(), {"eval_dataset": rows(4)}
    cached, plain = made(model, tmp_path, cache_prefix=True, **options), made(model, tmp_path, cls=Trainer, **options)
    without = cached.evaluate()["eval_loss"]
    remove = HOOKS[where](model)
    for _ in range(2):
        found = cached.evaluate()["eval_loss"]
        assert found == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-5) and abs(found - without) > 1e-4
    said = [record.getMessage() for record in caplog.records if "cache_prefix is off" in record.getMessage()]
    assert len(said) == 1 and where in said[0]
    remove()
    hits = cached._stack.prefix.store.rows.hits
    assert cached.evaluate()["eval_loss"] == without
    assert cached._stack.prefix.store.rows.hits == hits + 4


def test_hooks_that_only_look_leave_the_cache_on(tmp_path, caplog):
    model = recipient()
    model.enable_input_require_grads()
    model(rows(1)[0]["input_ids"][None], output_hidden_states=True)
    trainer = made(model, tmp_path, cache_prefix=True, eval_dataset=rows(4))
    for _ in range(2):
        trainer.evaluate()
    assert trainer._stack.prefix.store.rows.hits == 4 and not caplog.records


def test_models_that_accelerate_has_placed_are_cached(tmp_path):
    model = recipient()
    for module in model.model.layers:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    trainer = made(model, tmp_path, cache_prefix=True, eval_dataset=rows(4))
    for _ in range(2):
        trainer.evaluate()
    assert trainer._stack.prefix.store.rows.hits == 4


def padded(labels: str, side: str) -> list[dict[str, torch.Tensor]]:
    """Two rows, one of them padded, with labels up to there."""
    found = []
    for length, row in zip((9, 16), rows(2), strict=True):
        places = torch.arange(16)
        beyond = places >= {"tokens": length, "first of padding": length + 1, "all": 16}[labels]
        row = {**row, "labels": row["labels"].masked_fill(beyond, -100), "attention_mask": (places < length).long()}
        found.append({name: value.flip(0) if side == "left" else value for name, value in row.items()})
    return found


def encoder() -> TransplantedForMaskedLM:
    donor = DonorModel.from_base(tiny_model("bert"), (2, 3), mode="replace")
    return TransplantedForMaskedLM.from_pretrained(tiny_model("bert"), donor, is_trainable=True)


@pytest.mark.parametrize(
    ("make", "labels", "side", "is_cached"),
    [
        (recipient, "tokens", "right", True),
        (recipient, "first of padding", "right", True),  # predicted from the last token
        (recipient, "all", "right", False),
        (recipient, "all", "left", True),  # this padding is stored
        (encoder, "tokens", "right", True),
        (encoder, "first of padding", "right", False),
    ],
)
def test_labels_in_padding(make, labels, side, is_cached, tmp_path, caplog):
    model, data = make(), padded(labels, side)
    cached, plain = (
        made(model, tmp_path, cache_prefix=cache, eval_dataset=data, head_chunk=0) for cache in (True, False)
    )
    expected = plain.evaluate()["eval_loss"]
    for _ in range(2):
        assert cached.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert cached._stack.prefix.store.rows.hits == 2 * is_cached
    said = [each for each in caplog.messages if "cache_prefix does not store padding" in each]
    assert len(said) == (not is_cached)


ROPES: list[dict[str, Any]] = [
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_a_row_beside_one_that_changes_its_rotary_frequencies(rope, tmp_path):
    rope = {**rope, "rope_theta": 1e4, "original_max_position_embeddings": 12}
    base = tiny_model("llama", rope_parameters=rope, max_position_embeddings=12)
    donor = DonorModel.from_base(base, (2, 3), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    both = {
        name: torch.stack([row[name] for row in padded("tokens", "right")]) for name in padded("tokens", "right")[0]
    }
    alone = {name: value[:1, :9] for name, value in both.items()}
    cached, plain = (made(model, tmp_path, cache_prefix=cache) for cache in (True, False))
    for _ in range(3):  # there is a store for each state of the frequencies
        for batch in (alone, both):
            found, expected = (trainer.compute_loss(model, dict(batch)).item() for trainer in (cached, plain))
            assert found == pytest.approx(expected, abs=1e-6)


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    from not_hf.training import prefix_key

    read: list[torch.Tensor] = []
    digest = prefix_key._digest
    monkeypatch.setattr(prefix_key, "_digest", lambda tensor: read.append(tensor) or digest(tensor))
    model = recipient()
    batch = {key: torch.stack([each[key] for each in rows(2)]) for key in ("input_ids", "labels")}
    trainer = made(model.train(), tmp_path, cache_prefix=True)
    trainer.compute_loss(model, dict(batch))
    assert len(read) > 10
    read.clear()
    trainer.compute_loss(model, dict(batch))
    assert not read
    doubled(model)
    trainer.compute_loss(model, dict(batch))
    assert len(read) == 1 and read[0] is model.get_input_embeddings().weight


def test_a_folder_with_other_things_in_it_is_refused_at_the_start(tmp_path):
    (tmp_path / "work/thesis").mkdir(parents=True)
    (tmp_path / "work/thesis/thesis.tex").write_text("five years of work")
    with pytest.raises(NotHFError, match=r"prefix_dir .*work holds thesis, .*choose an empty or new folder"):
        made(recipient(), tmp_path, cache_prefix=True, prefix_dir=tmp_path / "work")
    assert [str(each.relative_to(tmp_path)) for each in sorted(Path(tmp_path).rglob("*"))] == [
        "work",
        "work/thesis",
        "work/thesis/thesis.tex",
    ]
    made(recipient(), tmp_path, prefix_dir=tmp_path / "work")  # not used


def test_rounding_of_float32_has_a_cache_of_its_own(tmp_path):
    before, keys = torch.get_float32_matmul_precision(), []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            trainer = made(recipient(), tmp_path, cache_prefix=True, eval_dataset=rows(2))
            trainer.evaluate()
            keys.append(trainer._stack.prefix.store.key)
    finally:
        torch.set_float32_matmul_precision(before)
    assert keys[0] != keys[1]


def with_a_trained_head() -> TransplantedForCausalLM:
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (2, 3), mode="replace")
    return TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True, modules_to_save=["lm_head"])


def of_a_head(tied: bool = False) -> Any:
    """A model of which only the head is trainable."""
    model = tiny_model("llama", tie_word_embeddings=tied).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


@pytest.mark.parametrize(("make", "entry"), [(with_a_trained_head, 2), (of_a_head, 4)])
def test_a_trained_head_stands_behind_what_is_cached(make, entry, tmp_path):
    plain, cached = made(make(), tmp_path / "plain"), made(make(), tmp_path, cache_prefix=True, eval_dataset=rows(2))
    for trainer in (plain, cached):
        trainer.train()
    assert losses(cached) == losses(plain)
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in (cached, plain))
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())
    assert not torch.equal(ours["lm_head.weight"], make().lm_head.weight)
    assert cached._stack.entry == entry and len(list((tmp_path / "prefixes").iterdir())) == 1  # one store, all along
    assert cached.evaluate()["eval_loss"] > 0


def test_a_head_that_is_the_embeddings_too_does_not(tmp_path):
    with pytest.raises(NotHFError, match=r"but model\.embed_tokens\.weight is trainable"):
        made(of_a_head(tied=True), tmp_path, cache_prefix=True).train()
