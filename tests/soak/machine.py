"""Random lives of a model with organs, each step compared with a model built anew."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from peft import LoraConfig, get_peft_model

from not_hf import DonorModel, IncompatibleDonorError, NotHFError, average_donors
from not_hf.architecture.stack import find_stack
from testing.donors import same, scaled_by_hand, transplanted_class
from testing.lifecycle import NORM_BEHIND, STILL_WRITE, base_of, organ_of
from testing.models import TOKEN_IDS, enable_checkpointing, logits

NAMES = ("a", "b", "c")
SCALES = (0.0, 0.3, 0.5, 1.0, 2.0)
made: Counter[str] = Counter()  # sequences and operations of this process


@functools.cache
def averaged(first: DonorModel, second: DonorModel) -> DonorModel:
    """Equal averages are one donor, so that `expected` knows them."""
    return average_donors([first, second], [0.25, 0.75])


@dataclass(frozen=True)
class Placed:
    """An organ as it should be."""

    name: str
    donor: DonorModel
    position: int
    mode: str
    scale: float = 1.0
    active: bool = True


@functools.cache
def _layers_at(model_type: str, position: int) -> DonorModel:
    return DonorModel.from_base(base_of(model_type), (position, position + 2))


def replaced_by(model_type: str, placed: Placed) -> DonorModel | None:
    """The base's layers in whose place an organ stands; `None` if it is inserted."""
    return _layers_at(model_type, placed.position) if placed.mode == "replace" else None


def has_scale(model_type: str, placed: Placed) -> bool:
    """Whether an organ can have another scale than 1: a replacement, that of layers of the same shapes."""
    replaced = replaced_by(model_type, placed)
    if replaced is None:
        return model_type not in NORM_BEHIND | STILL_WRITE
    ours, theirs = ({name: p.shape for name, p in each.named_parameters()} for each in (placed.donor, replaced))
    return ours == theirs


@functools.lru_cache(maxsize=2000)
def expected(model_type: str, organs: tuple[Placed, ...]) -> tuple[torch.Tensor, dict[str, Any], list[str]]:
    """Logits, config and names of parameters of a native model that is built anew with these organs."""
    model = copy.deepcopy(base_of(model_type))
    for placed in organs:
        place = {"donor_name": placed.name, "position": placed.position, "mode": placed.mode}
        donor = placed.donor
        if placed.scale != 1:
            donor = scaled_by_hand(donor, placed.scale, replaced_by(model_type, placed))
        model = transplanted_class(model).from_pretrained(model, donor, **place)
    with contextlib.suppress(AttributeError, IncompatibleDonorError):  # native already, or no native model has them
        model = model.merge_and_unload()
    return logits(model, TOKEN_IDS), model.config.to_dict(), [name for name, _ in model.named_parameters()]


class Life(RuleBasedStateMachine):
    """The life of one model; `organs` is what it should hold, in load order."""

    model_type = "llama"
    blocks = Bundle("blocks")  # open `disable_donors()` blocks

    @initialize(seed=st.integers(0, 3), position=st.integers(0, 4))
    def transplant(self, seed: int, position: int) -> None:
        made["sequences"] += 1
        self.model: Any = copy.deepcopy(base_of(self.model_type))
        self.organs: list[Placed] = []
        self.disabled = 0
        self._load(Placed("a", organ_of(self.model_type, seed), position, "insert"))

    def _load(self, placed: Placed) -> None:
        place = {"donor_name": placed.name, "position": placed.position, "mode": placed.mode}
        try:
            if self.organs:
                self.model.load_donor(placed.donor, **place)
            else:
                kind = transplanted_class(base_of(self.model_type))
                self.model = kind.from_pretrained(self.model, placed.donor, **place)
        except IncompatibleDonorError:
            assert overlaps(placed, self.organs) or placed.position > (4 if placed.mode == "insert" else 2)
        else:
            assert not overlaps(placed, self.organs)
            self.organs.append(placed)

    def _organ(self, name: str) -> int:
        """The number of the organ of that name, if there is one."""
        names = [placed.name for placed in self.organs]
        assume(name in names)
        return names.index(name)

    @rule(
        name=st.sampled_from(NAMES),
        seed=st.integers(0, 3),
        position=st.integers(0, 5),
        mode=st.sampled_from(["insert", "replace"]),
    )
    def load(self, name: str, seed: int, position: int, mode: str) -> None:
        assume(self.organs and name not in [placed.name for placed in self.organs])
        self._load(Placed(name, organ_of(self.model_type, seed), position, mode))

    @rule(names=st.sets(st.sampled_from(NAMES)))
    def choose(self, names: set[str]) -> None:
        assume(names <= {placed.name for placed in self.organs})
        chosen = [replace(placed, active=placed.name in names) for placed in self.organs]
        try:
            self.model.set_donor(sorted(names))
        except IncompatibleDonorError:
            assert any(overlaps(placed, chosen[:n]) for n, placed in enumerate(chosen) if placed.active)
        else:
            self.organs = chosen

    @rule(name=st.sampled_from(NAMES), scale=st.sampled_from(SCALES))
    def scale(self, name: str, scale: float) -> None:
        n = self._organ(name)
        refused = not has_scale(self.model_type, self.organs[n])
        try:
            self.model.set_donor_scale(name, scale)
        except NotHFError:
            assert refused and scale != 1
        else:
            assert not refused or scale == 1
            self.organs[n] = replace(self.organs[n], scale=scale)

    @rule(name=st.sampled_from(NAMES), seed=st.integers(0, 3))
    def swap(self, name: str, seed: int) -> None:
        n, donor = self._organ(name), organ_of(self.model_type, seed)
        self.model.hotswap_donor(name, donor)
        self.organs[n] = replace(self.organs[n], donor=donor)

    @rule(first=st.sampled_from(NAMES), second=st.sampled_from(NAMES))
    def average(self, first: str, second: str) -> None:
        n, m = self._organ(first), self._organ(second)
        free = [name for name in NAMES if name not in [placed.name for placed in self.organs]]
        assume(n != m and free)
        self.model.add_weighted_donor([first, second], [0.25, 0.75], free[0])
        donor = averaged(self.organs[n].donor, self.organs[m].donor)
        place = {"position": self.organs[n].position, "mode": self.organs[n].mode}
        self.organs.append(Placed(free[0], donor, active=False, **place))

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        n = self._organ(name)
        assume(len(self.organs) > 1)
        self.model.delete_donor(name)
        del self.organs[n]

    @rule(target=blocks)
    def disable(self) -> Any:
        block = self.model.disable_donors()
        block.__enter__()
        self.disabled += 1
        return block

    @rule(block=consumes(blocks))
    def enable(self, block: Any) -> None:
        block.__exit__(None, None, None)
        if block.model is self.model:
            self.disabled -= 1

    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, way: str) -> None:
        """The life goes on as a copy, in which no block is open."""
        try:
            self.model = copy.deepcopy(self.model) if way == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        except AttributeError as error:  # of hooks of transformers, with which native models cannot be pickled either
            assert "local object" in str(error)
        else:
            self.disabled = 0

    @precondition(lambda self: not self.disabled)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            names = [placed.name for placed in self.organs]
            alone = {"donor_name": names[0]} if len(names) == 1 else {}
            base = copy.deepcopy(base_of(self.model_type))
            try:
                self.model = transplanted_class(base).from_pretrained(base, folder, **alone)
            except IncompatibleDonorError:  # some are inactive because they overlap
                assert any(overlaps(placed, self.organs[:n], all_of_them=True) for n, placed in enumerate(self.organs))
                return
        if alone:  # a donor's config does not say that it was inactive
            self.organs = [replace(self.organs[0], active=True)]

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]))
    def convert(self, dtype: torch.dtype) -> None:
        """To float64 and back changes no bit."""
        self.model.to(dtype).to(torch.float32)

    @rule()
    def train_and_eval(self) -> None:
        self.model.train()
        enable_checkpointing(self.model)
        self.model(TOKEN_IDS, use_cache=False)
        self.model.gradient_checkpointing_disable()
        self.model.eval()

    @rule()
    def look_inside(self) -> None:
        out = self.model(TOKEN_IDS, output_hidden_states=True)
        assert len(out.hidden_states) == self.model.config.num_hidden_layers + 1

    @precondition(lambda self: not self.disabled)
    @rule()
    def put_adapters_on_top(self) -> None:
        before = logits(self.model, TOKEN_IDS)
        wrapped = get_peft_model(self.model, LoraConfig(r=2, target_modules="all-linear"))
        assert torch.equal(logits(wrapped, TOKEN_IDS), before)
        with wrapped.disable_adapter():
            wrapped(TOKEN_IDS)
        wrapped.unload()
        self.model.requires_grad_(False)

    @rule(merge=st.booleans())
    def leave(self, merge: bool) -> None:
        """The model becomes native, which must be a model of its own class; then an organ goes into a new one."""
        organs = tuple(placed for placed in self.organs if placed.active) if merge else ()
        native = base_of(self.model_type)
        try:
            left = copy.deepcopy(self.model)
            left = left.merge_and_unload() if merge else left.unload()
        except IncompatibleDonorError:
            return
        assert type(left) is type(native) and "_surgery" not in vars(left)
        values, config, _ = expected(self.model_type, organs)
        assert torch.equal(logits(left, TOKEN_IDS), values) and left.config.to_dict() == config
        if not organs:
            assert same(left, native)
            assert all(p.requires_grad for p in left.parameters())

    @invariant()
    def computes_what_a_new_model_does(self) -> None:
        made["operations"] += 1
        active = () if self.disabled else tuple(placed for placed in self.organs if placed.active)
        assert self.model.active_donors == [placed.name for placed in active]
        values, _, names = expected(self.model_type, active)
        found = logits(self.model, TOKEN_IDS)
        assert torch.equal(found, values), (self.organs, (found - values).abs().max())
        layers = find_stack(self.model).layers
        assert len(layers) == self.model.config.num_hidden_layers
        assert not any(parameter.requires_grad for parameter in self.model.parameters())
        assert [name for name, _ in self.model.named_parameters()] == names


def overlaps(placed: Placed, others: list[Placed], all_of_them: bool = False) -> bool:
    """Whether an organ of two layers cannot be in the stack together with the active ones of others."""
    for other in others:
        if not (other.active or all_of_them) or other is placed:
            continue
        low, high = sorted((placed, other), key=lambda each: each.position)
        if placed.mode == other.mode == "replace" and high.position < low.position + 2:
            return True
        if {placed.mode, other.mode} == {"insert", "replace"}:
            inserted, replaced = (placed, other) if placed.mode == "insert" else (other, placed)
            if replaced.position < inserted.position < replaced.position + 2:
                return True
    return False
