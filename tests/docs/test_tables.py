"""The figures that the documentation quotes are those of the results files."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from testing import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted([*RESULTS.glob("*.json"), *RESULTS.glob("paper/*.json")])
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIGURE = re.compile(r"[\d.,]*\d\s?(?:%|MB|GB|ms|s|nats|×)(?![\w·-])|perplexity (?:of )?\d")
NOT_MEASURED = {  # limits, levels and examples
    "docs/guides/evaluation.md": {"95 %", "1 %"},
    "docs/guides/sharing.md": {"1 MB", "5 GB"},
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def tables(benchmark):
    return benchmark("tables")


def test_the_tables_are_those_of_the_results(tables):
    for path, parts in tables.PAGES.items():
        text = path.read_text("utf-8")
        assert all(f"<!-- {name} -->" in text for name in parts)
        assert text == tables.written(text, parts), "run make bench-tables"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_figure_stands_outside_of_them(tables, page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    for name in tables.PAGES.get(page, ()):
        text = re.sub(f"<!-- {name} -->.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
    known = NOT_MEASURED.get(page.relative_to(ROOT).as_posix(), set())
    assert set(FIGURE.findall(text)) == known


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_results_file_says_where_it_comes_from(path):
    found = json.loads(path.read_text("utf-8"))
    assert (ROOT / found["script"]).is_file()
    assert all(re.match("[0-9a-f]{40}", each["commit"]) for each in found.get("runs", [found]))
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    assert found["hardware"]["processor"]


def test_the_card_has_the_figures_of_the_demo():
    card = ModelCard.load(ROOT / "model_cards" / "smollm2-135m-instruct-kjv.md")
    demo = json.loads((RESULTS / "demo.json").read_text("utf-8"))["perplexity"]
    values = {each.dataset_name: each.metric_value for each in card.data.eval_results}
    assert sorted(values.values()) == sorted(each["after"] for each in demo.values())
    for each in demo.values():
        assert f"| {round(each['before'], 2)} | {round(each['after'], 2)} |" in card.content


def test_the_cards_of_organs_have_the_figures_of_their_runs():
    for run in json.loads((RESULTS / "organs.json").read_text("utf-8"))["runs"]:
        path = ROOT / "model_cards" / f"smollm2-135m-instruct-{run['given']['domain']}-outputs.md"
        card = ModelCard.load(path)
        after = {each["after"] for each in run["metrics"].values()}
        assert {each.metric_value for each in card.data.eval_results} == after
        for name, each in run["metrics"].items():
            row = f"| {name.replace('_', ' ')} | {each['before']:.4g} | {each['after']:.4g} |"
            assert row in card.content
        assert f"saved at {run['scale']:g}," in card.content and path.with_suffix(".png").exists()


@pytest.mark.parametrize("small", [False, True])
def test_evidence_asks_scripts_for_what_they_have(benchmark, monkeypatch, tmp_path, small):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "paper")
    for script in benchmark("evidence").SCRIPTS:
        _, file, *options = script.command(tmp_path, small)
        with pytest.raises(SystemExit) as ended:
            benchmark(Path(file).stem).main([*options, "--help"])
        assert ended.value.code == 0, script


def test_evidence_makes_every_results_file(benchmark, tmp_path, capsys):
    evidence = benchmark("evidence")
    made = {script.results or script.name for script in evidence.SCRIPTS}
    assert {path.relative_to(RESULTS).with_suffix("").as_posix() for path in FILES} - made == {"demo"}
    assert all((ROOT / "benchmarks" / f"{script.name}.py").is_file() for script in evidence.SCRIPTS)
    assert not any(script.is_done(tmp_path) for script in evidence.SCRIPTS)
    assert evidence.main(["--list"]) == 0
    assert "train: " in capsys.readouterr().out  # may have runs left
    broken = evidence.Script("no_such_script", 1)
    assert evidence.run_all([broken], tmp_path, small=True) == 1
    assert "no_such_script failed" in capsys.readouterr().err
