"""The benchmarks in their small form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from testing import ROOT
from testing.processes import run_python

BENCHMARKS = ROOT / "benchmarks"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"),
]


def quick(
    name: str, folder: Path, *options: str | Path, form: str = "--quick", warm: bool = False
) -> tuple[str, dict]:
    """What a benchmark's small form prints, and its numbers."""
    command = [BENCHMARKS / name, *form.split(), "--output", folder / "found.json", *options]
    done = run_python(*command, warm=warm)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "found.json").read_text())


def test_extract(tmp_path):
    """A cut from the Hub serves and holds little more than the organ; the second one reads nothing.

    A merge holds little more than a tensor, and writes what one in memory writes, which the benchmark asserts.
    """
    printed, found = quick("extract.py", tmp_path)
    assert "served / organ" in printed
    ways = found["ways"]
    assert ways["range"]["organ_bytes"] > 60e6
    assert 1 <= ways["range"]["bytes_per_organ_byte"] <= 1.02
    assert ways["again"]["bytes_served"] < 5_000  # the commit that the branch is at
    # 1.00 in the full run; in an organ of this size connections and buffers weigh up to 0.2
    assert all(ways[way]["memory_per_organ_byte"] <= 1.3 for way in ("range", "again", "folder"))
    assert ways["whole"]["bytes_per_organ_byte"] > 2
    merges, bounds = found["merges"], found["bounds"]
    for way in ("merge-folder", "merge-hub"):
        assert merges[way]["built_because"] is None
        # buffers and connections weigh up to 40 MB, whatever the size of the model
        assert merges[way]["memory_growth"] < 1.5 * bounds["largest_tensor"] + bounds["layer"] + 40e6
    assert merges["merge-memory"]["memory_growth"] > merges["merge-memory"]["merged_bytes"]
    assert found["model_bytes"] * 0.99 < merges["merge-hub"]["bytes_served"] < found["model_bytes"] * 1.02


def test_prefill(tmp_path):
    """A prompt that organs share is not read again; the benchmark asserts that the tokens are the same."""
    printed, found = quick("prefill.py", tmp_path, warm=True)
    assert "| organs from layer |" in printed
    assert all(case["ratio"] < 1.3 * case["share_of_layers"] + 0.1 for case in found["cases"])


def test_sweep(tmp_path):
    """The benchmark asserts that a sweep gives what each position gives by itself."""
    printed, found = quick("sweep.py", tmp_path, warm=True)
    assert found["positions"] == found["num_layers"] + 1 and "| 7 positions of 6 layers |" in printed


def test_runtime(tmp_path):
    """Bounds that a busy machine keeps, and an engine ten times slower would not."""
    printed, found = quick("runtime.py", tmp_path)
    assert "| `set_donor` |" in printed
    assert found["decode"]["ratio"] > 0.5
    (loading,) = found["load"].values()
    assert loading["memory_ratio"] < 1.2
    assert loading["native_bytes"] == loading["transplanted_bytes"] > loading["base_bytes"]
    for twins in ("twins kept", "no twins kept"):
        assert loading[f"per_native, {twins}"] < 5 and loading[f"organ_ms, {twins}"] < 1000
        assert loading[f"forward_seconds, {twins}"] > loading[f"load_seconds, {twins}"] > loading["load_seconds, read"]
    bounds = [">= 0.99", "<= 1.05", "<= 1.05", "<= 25.00", "<= 25.00", "<= 1.05", "<= 5.00"]
    assert [each["target"] for each in found["targets"]] == bounds
    assert all(f"| {each['what']} | {each['target']} |" in printed for each in found["targets"])
    seconds = found["switch"]["seconds"]
    assert max(seconds["set_donor"], seconds["disable_donors"]) < 0.03


def test_trace_load(tmp_path):
    """A load does each thing once, and no two files call each other."""
    printed, found = quick("trace_load.py", tmp_path, form="")
    loads = found["loads"]
    assert all(f"| `{name}` |" in printed for name in loads)
    for name, load in loads.items():
        reads = load["reads of one config.json, at most"]
        assert set(reads.values()) == {1}
        assert len(reads) <= load["calls of `resolve_commit`"] <= len(reads) + 1
        assert set(load["requests for the commit of one repo, at most"].values()) == {1}
        # what is called back: a change, and a read that is tried again
        called_back = {"recipient/changes.py", "hub/consistent_read.py", "recipient/modeling.py"}
        assert all(set(pair) & called_back for pair in load["pairs of files that call each other"])
        assert load["compatibility checks"] == (0 if name == "from_base(base)" else 1)
        assert 1 <= load["twins built"] <= 2
    assert [load["checks of a donor's config"] for load in loads.values()] == [1, 1, 2, 2, 1]


def test_spans(tmp_path, demo_base):
    """Every span is trained from the same start and scored; each score chooses one of them."""
    printed, found = quick("spans.py", tmp_path, "--cache", demo_base.parent, warm=True)
    assert "| choose_span |" in printed
    text = found["texts"]["kjv"]
    spans = {tuple(span["layers"]): span for span in text["spans"]}
    assert list(spans) == [(0, 2), (2, 4), (4, 6)]
    assert len({span["gain"] for span in spans.values()}) == 3
    assert text["scores"]["the earlier the better"]["chosen"] == [0, 2]
    for score in text["scores"].values():
        assert -1 <= score["spearman"] <= 1 and score["gain"] == spans[tuple(score["chosen"])]["gain"]
    options = ("--cache", demo_base.parent, "--gains", tmp_path / "found.json")
    again, rescored = quick("spans.py", tmp_path, *options, warm=True)
    assert again == printed and rescored["texts"]["kjv"]["spans"] == text["spans"]


def test_scaffold(tmp_path, demo_base):
    """An organ trained alone is held with embeddings and head only, and goes into the whole base."""
    printed, found = quick("scaffold.py", tmp_path, "--cache", demo_base.parent)
    assert "| layers | trained |" in printed
    (span,) = found["spans"].values()
    start, whole, alone = (span["organs"][way] for way in ("untrained", "in the recipient", "alone"))
    assert 2 * whole["trained"] == 2 * alone["trained"] == whole["parameters"] - alone["parameters"]  # 2 of 6 layers
    assert start["replace"] == found["base"] != start["insert"]
    assert alone["in_the_scaffold"] != start["in_the_scaffold"]
    assert len({row[mode]["domain"] for row in span["organs"].values() for mode in ("replace", "insert")}) == 8


def test_train(tmp_path):
    """Each method is held against LoRA on the same rows; a second call trains nothing again."""
    printed, found = quick("train.py", tmp_path, form="--smoke", warm=True)
    assert "| organ, outputs |" in printed
    reference, *others = found["comparison"]
    assert reference["fresh"]["mean"] == 0 and reference["peak_bytes_saving"] > 0
    assert {each["method"] for each in others} == {"organ, outputs", "organ, all layers"}
    for each in found["comparison"]:
        assert each["losses"][f"{each['scale']:g}"]["domain"] < each["base"]["domain"]
        assert each["trained"] > 0 and each["file_bytes"] > 4 * each["trained"]
    assert (tmp_path / "found.png").stat().st_size > 10_000
    again, same = quick("train.py", tmp_path, form="--smoke", warm=True)
    assert again == printed and same["runs"] == found["runs"]


def test_recall(tmp_path):
    """Codes are taught and asked for, on the way and at the end."""
    printed, found = quick("recall.py", tmp_path, form="--smoke", warm=True)
    assert "| organ, upper half, cache |" in printed
    base, *runs = found["runs"]
    assert base["control"] == found["comparison"][0]["control_before"]
    for run in runs:
        assert [each["step"] for each in run["measures"]] == list(range(len(run["ends"]) + 1))
        assert run["losses"][-1] < run["losses"][0]


def test_organs(tmp_path):
    """An organ lowers the loss on its text, and its card says by how much, with the picture of its scales."""
    _, found = quick("organs.py", tmp_path, "--cards", tmp_path, form="--smoke", warm=True)
    (run,) = found["runs"]
    card = next(tmp_path.glob("*.md"))
    assert ModelCard.load(card).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert f"({card.stem}.png)" in card.read_text("utf-8") and card.with_suffix(".png").exists()
    assert run["scale"] == min(run["scales"], key=lambda row: row["perplexity"])["scale"]
    for kind in ("domain", "control"):
        found = run["metrics"][f"{kind}_perplexity"]
        assert f"| {kind} perplexity | {found['before']:.4g} | {found['after']:.4g} |" in card.read_text("utf-8")
    assert run["metrics"]["domain_perplexity"]["after"] < run["metrics"]["domain_perplexity"]["before"]


def test_lora_export(tmp_path, demo_base):
    """At full rank the adapter is the organ; at rank 1 it, and the delta, lie between organ and base."""
    printed, found = quick("lora_export.py", tmp_path, "--cache", demo_base.parent, warm=True)
    base, organ, low, full, bare, delta, rounded = found["rows"]
    assert "| LoRA, rank 1 |" in printed and "| delta, rank 1 |" in printed
    assert full["domain"] == pytest.approx(organ["domain"], rel=1e-3) and full["same_tokens"] == found["prompts"]
    assert organ["domain"] < low["domain"] < base["domain"]
    assert low["bytes"] < bare["bytes"] < full["bytes"] and low["error"] > 0.1 > full["error"]
    assert delta["domain"] == pytest.approx(low["domain"], rel=1e-3) and delta["lost"] > 0.1 > rounded["lost"]
    assert rounded["domain"] == pytest.approx(organ["domain"], rel=1e-3)
    assert delta["bytes"] < rounded["bytes"] < 0.51 * organ["bytes"]


def test_privacy(tmp_path):
    """Each method is attacked as trained and at the scale of equal loss, the organ elsewhere too."""
    printed, found = quick("privacy.py", tmp_path, form="--smoke", warm=True)
    assert "| organ, outputs, at equal loss |" in printed and "| … in random layers |" in printed
    trained = [run for run in found["runs"] if run["given"]["scale"] is None]
    attacks = [run for run in found["runs"] if run["given"]["scale"] is not None]
    equal, as_trained = attacks[:3], [run for run in attacks if run["given"]["scale"] == 1]
    assert len(trained) == len(as_trained) == 3
    assert max(run["losses"]["kjv"] for run in equal) - min(run["losses"]["kjv"] for run in equal) < 0.05
    for run in attacks:
        assert [row["repetitions"] for row in run["canaries"]][:3] == [0, 1, 3]
        assert {row["attack"] for row in run["attacks"]} == {"loss", "min-k", "reference", "control"}
    losses = {run["given"]["method"]: run["losses"]["kjv"] for run in as_trained}  # of what was kept
    assert losses == pytest.approx({run["given"]["method"]: run["losses"]["kjv"][-1] for run in trained}, abs=1e-3)
    recipients = {row["recipient"] for row in equal[0]["attacks"]}
    assert recipients == {"its own", "another fine-tune", "random layers"}
    assert (tmp_path / "found.png").stat().st_size > 10_000
