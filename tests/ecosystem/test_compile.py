"""torch.compile and torch.export of transplanted models: one graph, and never that of another stack."""

from __future__ import annotations

import copy
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from not_hf import TransplantedForCausalLM
from testing import EXAMPLES
from testing.donors import organ, transplanted
from testing.models import logits, tiny_model
from testing.releases import since
from testing.shapes import first_of, in_matrix

EXAMPLE = EXAMPLES / "fast_generation.py"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Graphs and their counts are the process's, not the test's."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def two_organs() -> TransplantedForCausalLM:
    """A llama with organs of two layers each, at different positions."""
    base = tiny_model("llama")
    return transplanted(("kjv", organ(base, 1), {}), ("law", organ(base, 2), {"position": 1}))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text"])
def test_one_graph_without_breaks(model_type, token_ids):
    base = tiny_model(model_type)
    found = torch._dynamo.explain(TransplantedForCausalLM.from_pretrained(base, organ(base, 1)))(token_ids)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize(("backend",), first_of([("eager",), ("aot_eager",)]))
def test_compiled_logits_are_those_of_the_model(token_ids, backend):
    model = two_organs()
    expected = logits(model, token_ids)
    assert torch.equal(logits(torch.compile(model, backend=backend, fullgraph=True), token_ids), expected)


@pytest.mark.slow
@pytest.mark.parametrize("of_layers", [False, True])
def test_a_copy_of_a_compiled_model_is_one_of_its_own(of_layers, base_folder, token_ids):
    """As of a native model: the graph stays behind. The organ of 16 bits has layers of a class of their own, too."""
    options = {"is_trainable": True, "dtype": torch.bfloat16}
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), organ(tiny_model("llama"), 1), **options)
    for module in model.model.layers if of_layers else [model]:
        module.compile(backend="eager")
    expected = logits(model, token_ids)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied, token_ids), expected)
        for parameter in copied.model.layers.parameters():
            parameter.data.zero_()
        assert not torch.equal(logits(copied, token_ids), expected)
    assert torch.equal(logits(model, token_ids), expected)


def test_an_organ_in_a_compiled_base_has_a_scale(token_ids):
    base = tiny_model("llama")
    base.model.compile(backend="eager")
    model = TransplantedForCausalLM.from_pretrained(base, organ(tiny_model("llama"), 1))
    model.set_donor_scale("default", 0.0)
    torch.testing.assert_close(logits(model, token_ids), logits(tiny_model("llama"), token_ids))


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", in_matrix("falcon_h1", "qwen3_next"))
def test_layers_with_a_state_compile(model_type, token_ids):
    base = tiny_model(model_type)
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1), position=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(*(logits(each, token_ids, use_cache=False) for each in (compiled, model)))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_inductor(token_ids):
    model = two_organs()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, token_ids), logits(model, token_ids), rtol=1e-4, atol=1e-4)
    model.hotswap_donor("kjv", organ(tiny_model("llama"), 3))
    torch.testing.assert_close(logits(compiled, token_ids), logits(model, token_ids), rtol=1e-4, atol=1e-4)


def in_place(model: torch.nn.Module, backend: Callable) -> Callable:
    model.compile(backend=backend, fullgraph=True)
    return model


COMPILED = {
    "model.compile()": in_place,
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend, fullgraph=True),
    "torch.compile(model.forward)": lambda model, backend: torch.compile(
        model.forward, backend=backend, fullgraph=True
    ),
}

WAYS = first_of((way,) for way in COMPILED)
ENDS = first_of(zip(COMPILED, ["delete_donor", "unload", "merge_and_unload"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("way",), WAYS)
def test_a_compiled_model_follows_its_organs(token_ids, way):
    plain, model, counter = two_organs(), two_organs(), CompileCounter()
    compiled = COMPILED[way](model, counter)
    seen = []
    for names in (["kjv", "law"], ["kjv"], ["law"], [], ["kjv", "law"], ["law"]):
        for each in (plain, model):
            each.set_donor(names)
        seen.append(logits(compiled, token_ids))
        assert torch.equal(seen[-1], logits(plain, token_ids)), names
        with plain.disable_donors(), model.disable_donors():
            assert torch.equal(logits(compiled, token_ids), logits(plain, token_ids)), names
    assert len({tuple(each.flatten().tolist()) for each in seen}) == 4  # of as many choices
    assert counter.frame_count <= 4  # a graph per choice at most; a depth that was seen before costs none


@pytest.mark.slow
@pytest.mark.parametrize(("way",), WAYS)
def test_weights_change_without_recompiling(token_ids, way):
    plain, model, counter = two_organs(), two_organs(), CompileCounter()
    compiled = COMPILED[way](model, counter)
    before, graphs = logits(compiled, token_ids), counter.frame_count
    other = organ(tiny_model("llama"), 5)
    changes = (
        lambda each: each.hotswap_donor("kjv", other),
        lambda each: each.set_donor_scale("kjv", 0.5),
        lambda each: each.set_donor_scale("kjv", 1.0),
    )
    for change in changes:
        for each in (plain, model):
            change(each)
        after = logits(compiled, token_ids)
        assert torch.equal(after, logits(plain, token_ids)) and not torch.equal(after, before)
        before = after
    assert counter.frame_count == graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize(("way", "end"), ENDS)
def test_a_compiled_model_outlives_its_organs(token_ids, way, end):
    plain, model = two_organs(), two_organs()
    compiled = COMPILED[way](model, CompileCounter())
    before = logits(compiled, token_ids)
    for each in (plain, model):
        getattr(each, end)(*(["kjv"] if end == "delete_donor" else []))
    after = logits(compiled, token_ids)
    assert torch.equal(after, logits(plain, token_ids))
    assert torch.equal(after, before) == (end == "merge_and_unload")


@pytest.mark.slow
def test_generating_with_a_static_cache_compiles_once_for_all_swaps(token_ids):
    plain, model, graphs = two_organs(), two_organs(), []

    def count(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    how = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=count)
    how._compile_all_devices = True  # transformers compiles on accelerators only, otherwise
    options = {"max_new_tokens": 6, "do_sample": False}
    outs = []
    for seed in (1, 5, 6):
        for each in (plain, model):
            each.hotswap_donor("kjv", organ(tiny_model("llama"), seed))
        outs.append(model.generate(token_ids, cache_implementation="static", compile_config=how, **options))
        assert outs[-1].tolist() == plain.generate(token_ids, **options).tolist()
    assert len({str(out.tolist()) for out in outs}) == 3
    assert len(graphs) == 1


@pytest.mark.slow
def test_an_exported_program_is_the_model_of_then(token_ids):
    model = two_organs()
    expected = logits(model, token_ids)
    program = torch.export.export(model, (), {"input_ids": token_ids, "use_cache": False}, strict=False)
    model.unload()
    found = program.module()(input_ids=token_ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@since("transformers", "5.16", "a swap makes one more graph")
@pytest.mark.slow
def test_the_example(base_folder, tmp_path, monkeypatch, capsys):
    base = str(base_folder("llama"))
    for seed in (1, 2):
        organ(base, seed).save_pretrained(tmp_path / str(seed))
    arguments = [str(tmp_path / "1"), "--swap", str(tmp_path / "2"), "--backend", "eager", "--prompt", "w5 w6 w7"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments, "--tokens", "5"])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assisted, first, second, graphs = capsys.readouterr().out.splitlines()
    assert assisted == f"assisted by its base: {first}"
    assert second != first
    assert graphs.endswith(", after the swap 0 more") and not graphs.startswith("graphs: 0,")
