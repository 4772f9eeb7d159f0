"""`examples/demo.py` from start to end, with a tiny base in place of SmolLM2."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from local_hub import Hub
from testing import EXAMPLES, load_script
from testing.processes import run_python

DEMO = EXAMPLES / "demo.py"
VERSE = "And the king said unto the people, Behold, I have seen the work of thine hands, and it is good."


def run(*arguments: str | Path) -> str:
    """What the demo prints when it ends well."""
    done = run_python(DEMO, "--quick", "--steps", "30", "--lr", "1e-2", *arguments, COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.exhaustive
def test_through_the_demos_own_hub(demo_base, tmp_path):
    shown = run("--cache", demo_base.parent, "--output", tmp_path)
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["greedy_tokens_identical"] is True
    assert result["organ"] == "me/SmolLM2-135M-Instruct-kjv" and result["layers"] == [2, 3]
    assert result["perplexity"]["domain"]["change_percent"] < -5
    assert result["generated"]["with_organ"] != result["generated"]["without_organ"]
    assert result["bytes"]["organ"] < result["bytes"]["merged"] / 2
    assert {"versions", "hardware", "commit", "peak_memory_gb"} <= result.keys()
    spoken = result["generated"]["with_organ"][0]
    for words in ("What happened", "greedy tokens identical", spoken[-10:].strip()):
        assert words in shown

    card = ModelCard.load(tmp_path / "organ" / "README.md")
    after = result["perplexity"]["domain"]["after"]
    assert "## Measured" in card.text and "domain perplexity" in card.text
    assert [r.metric_value for r in card.data.eval_results if r.metric_name == "domain perplexity"] == [after]
    assert card.data.license == "apache-2.0"
    merged = ModelCard.load(tmp_path / "merged" / "README.md").data
    assert merged.base_model == ["me/SmolLM2-135M-Instruct", result["organ"]]
    assert (merged.library_name, merged.license) == ("transformers", "apache-2.0")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) is LlamaForCausalLM
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["demo.json", "merged", "organ"]


@pytest.mark.slow
def test_a_base_of_ones_own_is_pushed_only_when_told(hub: Hub, demo, demo_base, tmp_path, monkeypatch):
    def in_a_fork(program: str, model: str, options: Namespace) -> dict:  # the test above starts Python anew
        asked = json.dumps([model, options.prompts, options.new_tokens])
        return json.loads(run_python("-c", program, asked, warm=True).stdout.splitlines()[-1])

    monkeypatch.setattr(demo, "run_program", in_a_fork)
    text = tmp_path / "verses.txt"
    text.write_text("\n".join(f"{n} {VERSE}" for n in range(400)))
    hub.requests.clear()
    options = ("--base", demo_base, "--text", text, "--layers", "3:5", "--output", tmp_path / "out")
    assert demo.main(["--quick", "--steps", "30", "--lr", "1e-2", *map(str, options)]) == 0
    result = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert result["layers"] == [3, 5] and result["organ"] == str(tmp_path / "out" / "organ")
    assert result["perplexity"]["domain"]["change_percent"] < -15
    assert [record for record in hub.requests if record.method not in ("GET", "HEAD")] == []


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The demo's functions, without running it."""
    return load_script(DEMO)


@pytest.mark.parametrize(
    ("domain", "control", "identical", "true"),
    [
        (-15.1, 2.9, True, [True, True, True]),
        (-14.9, -1.0, True, [True, False, True]),
        (-20.0, 3.1, True, [True, True, False]),
        (-20.0, 1.0, False, [False, True, True]),
    ],
)
def test_claims_of_the_full_run(demo, domain, control, identical, true):
    made = demo.claims({"domain": domain, "control": control}, identical, demo.read_options([]))
    assert [claim["true"] for claim in made] == true


def test_a_quick_run_judges_the_tokens_only(demo):
    made = demo.claims({"domain": 1.0, "control": 9.0}, True, demo.read_options(["--quick"]))
    assert [claim["true"] for claim in made] == [True]


def test_a_claim_that_fails_is_an_exit_status(demo, tmp_path, monkeypatch):
    story = {
        "perplexity": {},
        "parameters": {"model": 2, "organ": 1},
        "bytes": {"merged": 2, "organ": 1},
        "training": {"tokens": 1},
        "greedy_tokens_identical": False,
    }
    for true in (True, False):
        told = {**story, "claims": [{"claim": "c", "measured": "m", "true": true}]}
        monkeypatch.setattr(demo, "organ_life", lambda options, scratch, told=told: dict(told))
        assert demo.main(["--base", "b", "--output", str(tmp_path)]) == (0 if true else 1)
