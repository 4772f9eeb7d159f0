"""The common tester: a model with organs in one of a few set-ups, and every operation of an organ's life on it.

`tests/test_lifecycle.py` runs it over set-ups × architectures, as PEFT does with its configs and models.
"""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from not_hf import (
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
    UnsupportedArchitectureError,
    average_donors,
)
from not_hf.architecture.stack import head_class, is_encoder
from testing.donors import organ, scaled_by_hand
from testing.models import logits, tiny_model

Place = tuple[int, int, str]  # seed, position, mode

# Organs of the base's layers 1 and 2, by name in load order.
SETUPS: dict[str, dict[str, Place]] = {
    "insert": {"a": (1, 2, "insert")},
    "replace": {"a": (1, 1, "replace")},
    "two at one position": {"a": (1, 2, "insert"), "b": (2, 2, "insert")},
    "insert and replace": {"a": (1, 1, "insert"), "b": (2, 1, "replace"), "c": (3, 4, "insert")},
}

# Norms behind the projections would undo a scale.
POST_NORM = {"olmo2", "gemma2", "gemma3_text", "bert"}


@functools.cache
def _base(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type)


@functools.cache
def _organ(model_type: str, seed: int) -> DonorModel:
    return organ(_base(model_type), seed)


@dataclass
class Tester:
    """One architecture in one set-up; each `check_` is one operation and says whether it kept its promise."""

    __test__ = False  # not for pytest to collect
    model_type: str
    places: dict[str, Place]
    ids: torch.Tensor  # (batch, seq)
    base: PreTrainedModel = field(init=False)  # never changed
    transplanted: type = field(init=False)

    def __post_init__(self) -> None:
        self.base = _base(self.model_type)
        self.transplanted = TransplantedForMaskedLM if is_encoder(self.base.config) else TransplantedForCausalLM

    def model(self, *names: str, **options) -> TransplantedForCausalLM | TransplantedForMaskedLM:
        """A fresh base with these organs, all of the set-up unless some are named."""
        model = copy.deepcopy(self.base)
        for name in names or self.places:
            seed, position, mode = self.places[name]
            donor = _organ(self.model_type, seed)
            place = {"donor_name": name, "position": position, "mode": mode}
            model = self.transplanted.from_pretrained(model, donor, **place, **options)
        return model

    def same(self, ours: PreTrainedModel, theirs: PreTrainedModel) -> bool:
        """Whether two models give the same logits, bit for bit."""
        return torch.equal(logits(ours, self.ids), logits(theirs, self.ids))

    def check_choosing(self) -> None:
        model, names = self.model(), list(self.places)
        assert model.active_donors == names
        for name in names:
            model.set_donor(name)
            assert model.active_donors == [name] and self.same(model, self.model(name))
        model.set_donor(names[::-1])
        assert model.active_donors == names and self.same(model, self.model())
        model.set_donor([])
        assert model.active_donors == [] and self.same(model, self.base)
        with pytest.raises(NotHFError, match="no organ named nobody"):
            model.set_donor("nobody")

    def check_disabling(self) -> None:
        model = self.model()
        with pytest.raises(KeyError), model.disable_donors():
            with model.disable_donors():
                assert self.same(model, self.base)
            assert model.active_donors == [] and model.config.to_dict() == self.base.config.to_dict()
            assert self.same(model, self.base)
            raise KeyError
        assert model.active_donors == list(self.places) and self.same(model, self.model())

    def check_deleting(self) -> None:
        for name in self.places:
            model, others = self.model(), [other for other in self.places if other != name]
            model.delete_donor(name)
            assert model.active_donors == list(model.donor_config) == others
            assert self.same(model, self.model(*others) if others else self.base)

    def check_unloading(self) -> None:
        native = self.model().unload()
        assert type(native) is type(self.base) and native.config.to_dict() == self.base.config.to_dict()
        flags = {name: parameter.requires_grad for name, parameter in self.base.named_parameters()}
        assert {name: parameter.requires_grad for name, parameter in native.named_parameters()} == flags
        assert self.same(native, self.base)

    def check_merging(self, folder: Path) -> None:
        native = self.model().merge_and_unload()
        assert type(native) is type(self.base) and self.same(native, self.model())
        assert all(parameter.requires_grad for parameter in native.parameters())
        native.save_pretrained(folder)
        assert self.same(head_class(self.base.config).from_pretrained(folder), self.model())

    def check_scaling(self) -> None:
        model, names = self.model(), list(self.places)
        scalable = [name for name in names if self.places[name][2] == "insert"]
        for name in names:
            if name not in scalable or self.model_type in POST_NORM:
                with pytest.raises(
                    (NotHFError, UnsupportedArchitectureError), match=r"inserted organs|norm undoes it"
                ):
                    model.set_donor_scale(name, 0.5)
                assert self.same(model, self.model())
                continue
            model.set_donor_scale(name, 0.5)
            expected = self.model()
            expected.hotswap_donor(name, scaled_by_hand(_organ(self.model_type, self.places[name][0]), 0.5))
            assert self.same(model, expected)
            model.set_donor_scale(name, 1)
            assert self.same(model, self.model())

    def check_swapping(self) -> None:
        model, other = self.model(), _organ(self.model_type, 9)
        places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
        for name in self.places:
            model.hotswap_donor(name, other)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
        swapped = Tester(self.model_type, {name: (9, *place[1:]) for name, place in self.places.items()}, self.ids)
        assert self.same(model, swapped.model())

    def check_averaging(self) -> None:
        model, name = self.model(), next(iter(self.places))
        model.load_donor(other := _organ(self.model_type, 9), "other", position=4, mode="insert")
        model.add_weighted_donor([name, "other"], [1, 3], "mean")
        assert model.active_donors == [*self.places, "other"]
        model.set_donor("mean")
        seed, position, mode = self.places[name]
        mean = average_donors([_organ(self.model_type, seed), other], [1, 3])
        place = {"position": position, "mode": mode}
        expected = self.transplanted.from_pretrained(copy.deepcopy(self.base), mean, **place)
        assert self.same(model, expected)

    def check_status(self) -> None:
        model = self.model()
        model.set_donor(next(iter(self.places)))
        for name, status in model.get_donor_status().items():
            assert (status.position, status.mode) == self.places[name][1:] and status.span == (1, 3)
            assert status.active is (name in model.active_donors) is bool(status.layers)
            assert status.num_parameters == _organ(self.model_type, 1).num_parameters()

    def check_saving(self, folder: Path) -> None:
        model = self.model()
        model.save_pretrained(folder / "all")
        assert self.same(self.transplanted.from_pretrained(copy.deepcopy(self.base), folder / "all"), self.model())
        for name in self.places:
            model.save_pretrained(folder / name, selected_donors=[name])
            alone = self.transplanted.from_pretrained(copy.deepcopy(self.base), folder / name)
            assert self.same(alone, self.model(name))

    def check_copies(self) -> None:
        model = self.model()
        model.set_donor(next(iter(self.places)))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.active_donors == model.active_donors and self.same(twin, model)
            twin.set_donor(list(self.places))
            assert self.same(twin, self.model())
            assert self.same(twin.unload(), self.base)
        assert isinstance(model, self.transplanted)

    def check_dtype_of_what_is_parked(self) -> None:
        model = self.model()
        model.set_donor([])
        model.to(torch.bfloat16)
        model.set_donor(list(self.places))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert self.same(model, self.model().to(torch.bfloat16))

    def check_training(self) -> None:
        model = self.model(is_trainable=True)
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        learning = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in learning)
        torch.optim.SGD(learning, lr=0.1).step()
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], tensor) and now[name].grad is None for name, tensor in frozen.items())
        assert not self.same(model, self.model())
        with model.disable_donors():
            assert self.same(model, self.base)

    def check_generating(self) -> None:
        model, options = self.model(), {"do_sample": False, "max_new_tokens": 6}
        options["attention_mask"] = torch.ones_like(self.ids)
        cached = model.generate(self.ids, **options)
        assert torch.equal(cached, model.generate(self.ids, use_cache=False, **options))
        model.set_donor([])
        assert torch.equal(model.generate(self.ids, **options), self.base.generate(self.ids, **options))
        model.set_donor(list(self.places))
        assert torch.equal(model.generate(self.ids, **options), cached)

    def check_vocabulary(self) -> None:
        model = self.model()
        model.resize_token_embeddings(100, mean_resizing=False)
        expected = self.model()
        assert torch.equal(logits(model, self.ids)[..., :96], logits(expected, self.ids))
        native = model.unload()
        assert native.config.vocab_size == 100 == native.get_input_embeddings().weight.shape[0]
