"""The common tester: a model with organs in one of a few set-ups, and every operation of an organ's life on it.

`tests/recipient/test_lifecycle.py` runs it over architectures × set-ups, as PEFT does with its models and configs.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf import (
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
    UnsupportedArchitectureError,
    average_donors,
)
from not_hf.architecture.part_names import ALL
from not_hf.architecture.splicing import place_bound
from not_hf.architecture.stack import find_stack, head_class
from testing.donors import SPAN, grafted, organ, same, scaled_by_hand, transplanted_class
from testing.generation import (
    NEW_TOKENS,
    NO_BEAMS,
    ONE_PREFILL,
    PADDING,
    behind_padding,
    generate,
    in_chunks,
    padded,
    static_cache_works,
)
from testing.models import TOKEN_IDS, enable_checkpointing, tiny_model
from testing.models import exact_logits as logits
from testing.shapes import VOCAB


class Place(NamedTuple):
    """An organ of the base's layers 1 and 2, and where it stands; `modules` are those of the layers that it holds."""

    seed: int
    position: int
    mode: str
    modules: str = ALL


_ABOVE = Place(2, 3, "insert")

# Organs by name in load order.
SETUPS: dict[str, dict[str, Place]] = {
    "insert": {"a": Place(1, 2, "insert")},
    "replace": {"a": Place(1, 1, "replace")},
    "several": {
        **{"a": Place(1, 1, "insert"), "b": Place(2, 1, "replace")},
        **{"c": Place(3, 4, "insert"), "d": Place(4, 4, "insert")},
    },
    "two": {"a": Place(1, 1, "replace"), "b": _ABOVE},
}
PARTS = {part: {"a": Place(1, 1, "replace", part)} for part in ("outputs", "attention", "mlp")}
PARTS["outputs"]["b"] = _ABOVE

# Why layers of some architectures have no scale: a norm behind their projections, or a bias behind their norm.
NORM_BEHIND = {"exaone4", "gemma2", "gemma3_text", "gemma4_text", "glm4", "minimax", "olmo2", "olmo3"} | {
    *("bert", "camembert", "data2vec-text", "electra", "ernie", "roberta", "xlm-roberta")
}
STILL_WRITE = {"distilbert"}


@functools.cache
def base_of(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type)


@functools.cache
def organ_of(model_type: str, seed: int, modules: str = ALL) -> DonorModel:
    base = base_of(model_type)
    mode = "replace" if place_bound(base.config) or modules != ALL else "insert"
    return organ(base, seed, mode=mode, modules=modules)


def _with_organs(model: PreTrainedModel, places: Iterable[tuple[str, Place]], **options) -> PreTrainedModel:
    for name, (seed, position, mode, modules) in places:
        place = {"donor_name": name, "position": position, "mode": mode}
        donor = organ_of(model.config.model_type, seed, modules)
        model = transplanted_class(model).from_pretrained(model, donor, **place, **options)
    return model


@functools.cache
def _loaded(model_type: str, places: tuple[tuple[str, Place], ...]) -> PreTrainedModel:
    return _with_organs(copy.deepcopy(base_of(model_type)), places)


@functools.cache
def _expected(model_type: str, places: tuple[tuple[str, Place], ...]) -> torch.Tensor:
    """The logits of a base with these organs; parts of layers are put into it by name, and are no organ there."""
    model, organs = copy.deepcopy(base_of(model_type)), []
    for name, place in places:
        if place.modules == ALL:
            organs.append((name, place))
        else:
            model = grafted(model, organ_of(model_type, place.seed, place.modules))
    return logits(_with_organs(model, organs), TOKEN_IDS)


@dataclass(frozen=True)
class Tester:
    """One architecture in one set-up; each `check_` is one operation and says whether it kept its promise."""

    __test__ = False  # not for pytest to collect
    model_type: str
    places: dict[str, Place]

    @property
    def base(self) -> PreTrainedModel:
        """Never changed."""
        return base_of(self.model_type)

    def fresh(self) -> TransplantedForCausalLM | TransplantedForMaskedLM:
        """A model with all organs of the set-up: a copy of one that is loaded once."""
        return copy.deepcopy(_loaded(self.model_type, tuple(self.places.items())))

    def gives(self, model: PreTrainedModel, names: Iterable[str] | None = None) -> bool:
        """Whether a model computes, bit for bit, what a fresh one with these organs does; with all, unless told."""
        return torch.equal(logits(model, TOKEN_IDS), self.expected(self.places if names is None else names))

    def expected(self, names: Iterable[str]) -> torch.Tensor:
        """What a fresh model with these organs computes, `(batch, seq, vocab)`."""
        return _expected(self.model_type, tuple((name, self.places[name]) for name in names))

    def donor(self, name: str, seed: int | None = None) -> DonorModel:
        """The donor of an organ of the set-up, or one of another seed for its place."""
        place = self.places[name]
        return organ_of(self.model_type, place.seed if seed is None else seed, place.modules)

    def without(self, name: str) -> list[str]:
        """The other organs."""
        return [other for other in self.places if other != name]

    def check_choosing(self) -> None:
        model, names = self.fresh(), list(self.places)
        for chosen in (names, [], *([name] for name in names), *map(self.without, names)):
            model.set_donor(chosen[::-1])
            assert model.active_donors == chosen and self.gives(model, chosen)
            assert model.config.num_hidden_layers == len(find_stack(model).layers)
        with pytest.raises(NotHFError, match=f"no organ named nobody; loaded organs: {', '.join(names)}"):
            model.set_donor("nobody")
        assert model.active_donors == chosen

    def check_disabling(self) -> None:
        model = self.fresh()
        with pytest.raises(KeyError), model.disable_donors():
            with model.disable_donors():
                assert self.gives(model, [])
            assert model.active_donors == [] and model.config.to_dict() == self.base.config.to_dict()
            assert self.gives(model, [])
            raise KeyError
        assert model.active_donors == list(self.places) and self.gives(model)

    def check_deleting(self) -> None:
        for name in self.places:
            model = self.fresh()
            model.delete_donor(name)
            assert model.active_donors == list(model.donor_config) == self.without(name)
            assert self.gives(model, self.without(name))

    def check_unloading(self) -> None:
        native = self.fresh().unload()
        assert type(native) is type(self.base) and native.config.to_dict() == self.base.config.to_dict()
        flags = {name: parameter.requires_grad for name, parameter in self.base.named_parameters()}
        assert {name: parameter.requires_grad for name, parameter in native.named_parameters()} == flags
        assert same(native, self.base) and self.gives(native, [])

    def check_merging(self, folder: Path) -> None:
        native = self.fresh().merge_and_unload()
        assert type(native) is type(self.base) and self.gives(native)
        assert all(parameter.requires_grad for parameter in native.parameters())
        native.save_pretrained(folder)
        assert self.gives(head_class(self.base.config).from_pretrained(folder))

    def check_scaling(self, folder: Path) -> None:
        model, whole = self.fresh(), self.fresh()
        why_no_scale = "they still write" if self.model_type in STILL_WRITE else "a norm undoes it"
        for name, place in {place.mode: (name, place) for name, place in reversed(self.places.items())}.values():
            if place.mode == "insert" and self.model_type in NORM_BEHIND | STILL_WRITE:
                with pytest.raises(UnsupportedArchitectureError) as raised:
                    model.set_donor_scale(name, 0.5)
                assert why_no_scale in str(raised.value) and self.gives(model)
                model.set_donor_scale(name, 1)
                continue
            model.set_donor_scale(name, 0.3)  # exact in no dtype
            scaled = logits(model, TOKEN_IDS)
            by_hand = copy.deepcopy(whole)
            own = {"mode": "replace", "modules": place.modules}
            replaced = DonorModel.from_base(self.base, SPAN, **own) if place.mode == "replace" else None
            by_hand.hotswap_donor(name, scaled_by_hand(self.donor(name), 0.3, replaced))
            assert torch.equal(scaled, logits(by_hand, TOKEN_IDS)) and not self.gives(model)
            assert any(folder.iterdir()) or self.a_scale_is_kept(model, name, folder)
            model.set_donor_scale(name, 0)
            assert torch.equal(logits(model, TOKEN_IDS), self.expected(self.without(name)))
            model.set_donor_scale(name, 1)
            assert same(model, whole) and self.gives(model)

    def a_scale_is_kept(self, model: TransplantedForCausalLM, name: str, folder: Path) -> bool:
        """Whether a scale is saved beside the weights, not in them, and merged into them."""
        base, scaled = copy.deepcopy(self.base), logits(model, TOKEN_IDS)
        model.save_pretrained(folder)
        alone = DonorModel.from_pretrained(folder, subfolder=name if len(self.places) > 1 else "")
        again = transplanted_class(base).from_pretrained(base, folder)
        merged = copy.deepcopy(model).merge_and_unload()
        found = [logits(each, TOKEN_IDS) for each in (again, merged)]
        return same(alone, self.donor(name)) and all(map(scaled.equal, found))

    def check_swapping(self) -> None:
        model = self.fresh()
        tensors = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        for name in self.places:
            model.hotswap_donor(name, self.donor(name, 9))
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == tensors
        swapped = {name: place._replace(seed=9) for name, place in self.places.items()}
        assert Tester(self.model_type, swapped).gives(model)

    def check_averaging(self) -> None:
        model, (name, place) = self.fresh(), next(iter(self.places.items()))
        where = {"position": place.position, "mode": place.mode}
        model.set_donor([])
        model.load_donor(other := self.donor(name, 9), "other", **where)
        model.add_weighted_donor([name, "other"], [1, 3], "mean")
        assert model.active_donors == ["other"]
        model.set_donor("mean")
        base, mean = copy.deepcopy(self.base), average_donors([self.donor(name), other], [1, 3])
        expected = transplanted_class(base).from_pretrained(base, mean, **where)
        assert torch.equal(logits(model, TOKEN_IDS), logits(expected, TOKEN_IDS))

    def check_status(self) -> None:
        model = self.fresh()
        model.set_donor(next(iter(self.places)))
        for name, status in model.get_donor_status().items():
            assert (status.position, status.mode) == self.places[name][1:3] and status.span == (1, 3)
            assert status.active is (name in model.active_donors) is bool(status.layers)
            assert status.num_parameters == self.donor(name).num_parameters()

    def check_saving(self, folder: Path) -> None:
        model = self.fresh()
        model.save_pretrained(folder / "all")
        for name in self.places:
            model.save_pretrained(folder / name, selected_donors=[name])
        for saved, names in (("all", None), *((name, [name]) for name in self.places)):
            base = copy.deepcopy(self.base)
            assert self.gives(transplanted_class(base).from_pretrained(base, folder / saved), names)
            if self.places.get(saved, _ABOVE).modules != ALL:
                assert same(DonorModel.from_pretrained(folder / saved), self.donor(saved))
        assert not list(folder.rglob("adapter_config.json"))  # transformers would take it for PEFT's

    def check_copies(self) -> None:
        model, (first, *_) = self.fresh(), self.places
        model.set_donor(first)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(twin, transplanted_class(self.base)) and isinstance(twin, type(self.base))
            assert twin.active_donors == [first] and self.gives(twin, [first])
            twin.set_donor(list(self.places))
            assert self.gives(twin) and self.gives(twin.unload(), [])
        assert model.active_donors == [first] and self.gives(model, [first])

    def check_dtype_and_mode_of_what_is_parked(self) -> None:
        expected, base = (logits(m.to(torch.bfloat16), TOKEN_IDS) for m in (self.fresh(), copy.deepcopy(self.base)))
        names = list(self.places)
        for active in ([], names):  # the others are parked, or the layers that are replaced
            model = self.fresh()
            model.set_donor(active)
            model.to(torch.bfloat16).train()
            model.set_donor(names)
            assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
            assert all(module.training for module in model.modules())
            assert torch.equal(logits(model.eval(), TOKEN_IDS), expected)
            with model.disable_donors():
                assert torch.equal(logits(model, TOKEN_IDS), base)

    def check_training(self) -> None:
        for checkpointing in (False, True):
            model = _with_organs(copy.deepcopy(self.base), self.places.items(), is_trainable=True).train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            if checkpointing:
                enable_checkpointing(model)
            inside = {id(p) for held in model._surgery.organs.values() for p in held.parameters()}
            frozen = {name: p.clone() for name, p in model.named_parameters() if id(p) not in inside}
            model(TOKEN_IDS, labels=TOKEN_IDS, use_cache=False).loss.backward()
            learning = [p for p in model.parameters() if p.requires_grad]
            assert {id(p) for p in learning} == {id(p) for p in model.parameters() if p.grad is not None} == inside
            assert all(p.grad.isfinite().all() for p in learning) and any(p.grad.any() for p in learning)
            torch.optim.SGD(learning, lr=0.1).step()
            now = dict(model.eval().named_parameters())
            assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
            assert not self.gives(model)
            with model.disable_donors():
                assert self.gives(model, [])

    def check_generating(self) -> None:
        model, base = self.fresh(), copy.deepcopy(self.base)
        static = static_cache_works(base)
        for attention in ("eager", "sdpa"):
            try:
                base.set_attn_implementation(attention)
            except ValueError:  # the base itself does not have it
                continue
            model.set_attn_implementation(attention)
            greedy = generate(model)
            assert greedy.shape == (2, TOKEN_IDS.shape[1] + NEW_TOKENS)
            assert torch.equal(greedy, generate(model, use_cache=False))
            if static:
                assert torch.equal(greedy, generate(model, cache_implementation="static"))
            model.set_donor([])
            assert torch.equal(generate(model), generate(base))
            model.set_donor(list(self.places))
            assert torch.equal(generate(model), greedy)
        if self.model_type not in NO_BEAMS:
            assert torch.equal(generate(model, num_beams=2), generate(model, num_beams=2, use_cache=False))

    def check_continuing(self) -> None:
        model = self.fresh()
        greedy = generate(model)
        assert torch.equal(greedy, generate(model, use_cache=False))
        assert torch.equal(generate(model, *behind_padding())[:, PADDING:], greedy)
        whole = logits(model, TOKEN_IDS)
        assert torch.allclose(padded(model), whole, atol=1e-4)
        if self.model_type not in ONE_PREFILL:
            assert torch.allclose(in_chunks(model), whole, atol=1e-4)

    def check_vocabulary(self) -> None:
        model = self.fresh()
        model.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
        for names in (self.places, []):
            if not names:
                model = model.unload()
            assert torch.equal(logits(model, TOKEN_IDS)[..., :VOCAB], self.expected(names))
            assert model.config.vocab_size == VOCAB + 4 == model.get_input_embeddings().weight.shape[0]
            assert model.get_output_embeddings().weight.shape[0] == VOCAB + 4
