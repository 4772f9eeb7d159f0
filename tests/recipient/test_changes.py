"""A change of a model is made whole or not at all, whenever Ctrl-C comes and whatever other threads do."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from not_hf import DonorModel, IncompatibleDonorError, NotHFError, TransplantedForCausalLM
from not_hf.recipient.changes import Changes
from not_hf.recipient.mixin import Recipient
from testing.changes import OPERATIONS, state_of, try_interrupts, with_two_organs
from testing.donors import SPAN, tiny_organ
from testing.interrupting import interrupted
from testing.models import TOKEN_IDS, logits, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupted_change_is_made_or_undone(operation):
    found = try_interrupts(operation, points=8)
    assert found["neither"] == 0 and sum(found.values()) >= 8


@pytest.mark.slow
def test_an_interrupted_transplant_leaves_the_model_or_its_organs():
    base = tiny_model("llama")
    base.model.embed_tokens.requires_grad_(False)
    before, donor = state_of(base), tiny_organ(1)

    def transplant(model: PreTrainedModel) -> TransplantedForCausalLM:
        return TransplantedForCausalLM.from_pretrained(model, donor, is_trainable=True)

    after = state_of(transplant(copy.deepcopy(base)))
    steps = interrupted(lambda: transplant(copy.deepcopy(base)))
    for step in range(0, steps, max(1, steps // 20)):
        model = copy.deepcopy(base)
        interrupted(lambda model=model: transplant(model), step)
        assert state_of(model) in (before, after), step
        native = model if isinstance(model, Recipient) else transplant(model)
        assert state_of(native.unload()) == before


def test_undoing_that_is_interrupted_is_completed_by_the_next_use():
    changes, done = Changes(), []

    def undo() -> None:
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt

    def fail() -> None:
        raise RuntimeError

    with pytest.raises(KeyboardInterrupt):
        changes.make(fail, undo)
    changes.repair()
    changes.repair()
    assert done == [0, 1]


def test_a_block_whose_exit_never_began_ends_with_its_object():
    model = with_two_organs()
    before = logits(model, TOKEN_IDS)
    block = model.disable_donors()
    block.__enter__()
    assert model.active_donors == [] and len(model.model.layers) == 4
    del block
    assert torch.equal(logits(model, TOKEN_IDS), before)
    assert model.active_donors == ["a", "b"] and len(model.model.layers) == 8


def test_disable_donors_decorates_functions():
    model = with_two_organs()
    assert model.disable_donors()(lambda: model.active_donors)() == []
    assert model.active_donors == ["a", "b"]


@pytest.mark.slow
def test_generating_while_another_thread_changes_organs_gives_one_state_or_an_error():
    model = with_two_organs()
    options = {"attention_mask": torch.ones_like(TOKEN_IDS), "max_new_tokens": 12, "do_sample": False}
    states = [lambda: model.set_donor("a"), lambda: model.set_donor("b"), lambda: model.set_donor_scale("a", 1)]
    states += [lambda: model.set_donor(["a", "b"]), lambda: model.set_donor_scale("a", 0.5)]
    expected = []
    for change in states:
        change()
        expected.append(model.generate(TOKEN_IDS, **options).tolist())
    outputs, errors, stop = [], [], threading.Event()

    def generate() -> None:
        while not stop.is_set():
            try:
                outputs.append(model.generate(TOKEN_IDS, **options).tolist())
            except NotHFError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=generate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(40):
        states[n % len(states)]()
        if n % 10 == 0:
            stop.wait(0.05)
    stop.wait(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    assert outputs and errors, "neither an undisturbed call nor a disturbed one"
    assert all(output in expected for output in outputs)
    assert all("another thread changed the organs" in error for error in errors)


@pytest.mark.slow
def test_changes_of_several_threads_come_one_after_another():
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1), donor_name="a", position=2)
    before, failures = logits(model, TOKEN_IDS), []

    def load_and_delete(name: str) -> None:
        try:
            for _ in range(5):
                model.load_donor(tiny_organ(2), name, position=0)
                model.set_donor_scale(name, 0.5)
                model.delete_donor(name)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load_and_delete, args=(f"organ {n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(model.donor_config) == ["a"] and torch.equal(logits(model, TOKEN_IDS), before)


def test_a_change_that_fails_undoes_no_change_of_another_thread():
    model, started = with_two_organs(), threading.Event()
    surgery = model._surgery

    def remove() -> None:
        started.set()
        time.sleep(0.1)
        del surgery.organs["b"]

    def fail() -> None:
        raise ValueError

    other = threading.Thread(target=surgery.change, args=(model, remove))
    other.start()
    started.wait()
    with pytest.raises(ValueError):
        surgery.change(model, fail)
    other.join()
    assert list(model.donor_config) == ["a"] and len(model.model.layers) == 6


def test_a_choice_that_is_refused_disturbs_no_call_of_another_thread():
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1, mode="replace"), donor_name="a")
    model.set_donor([])
    model.load_donor(tiny_organ(2, mode="replace"), "b")

    def choose() -> None:
        with pytest.raises(IncompatibleDonorError, match="already replaced"):
            model.set_donor(["a", "b"])

    thread = threading.Thread(target=choose)
    with model._surgery.changes.watched():
        thread.start()
        thread.join()
    assert model.active_donors == ["b"]


def test_a_callback_may_change_organs_during_its_own_call():
    model = with_two_organs()

    def halve(module: Any, args: Any) -> None:
        model.set_donor_scale("b", 0.5)

    handle = model.lm_head.register_forward_pre_hook(halve)
    model(TOKEN_IDS)
    handle.remove()
    assert model.donor_config["b"].scale == 0.5


def test_a_scale_check_leaves_the_live_stack_alone():
    model, seen = with_two_organs(), []
    stack = model.model.layers
    real = type(stack).__setattr__
    layers = list(stack)

    class Watched(type(stack)):
        def __setattr__(self, name: str, value: Any) -> None:
            seen.append(name)
            real(self, name, value)

    stack.__class__ = Watched
    model.set_donor_scale("a", 0.25)
    assert not seen and list(stack) == layers


def test_twins_are_built_by_several_threads_at_once():
    donors: list[DonorModel] = []
    bases = [tiny_model(model_type) for model_type in ("llama", "qwen3", "gpt2")] * 2
    threads = [
        threading.Thread(target=lambda base=base: donors.append(DonorModel.from_base(base, SPAN))) for base in bases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(donors) == 6
    assert torch.nn.init.normal_(torch.zeros(4)).any()  # initialization is not left switched off
