"""lm-evaluation-harness on an organ by its ID, as its users start it; the scores are those of the model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from not_hf import TransplantedForCausalLM
from testing import EXAMPLES
from testing.donors import organ
from testing.models import tiny_tokenizer
from testing.processes import run_python

EXAMPLE = EXAMPLES / "lm_eval_harness.py"
QUESTIONS = [
    {"question": "w5 w6 w7", "choices": ["w9 w20", "w10 w4", "w11 w12 w13"], "answer": 0},
    {"question": "w30 w31", "choices": ["w32", "w5", "w90 w91"], "answer": 2},
    {"question": "w8 w8 w9", "choices": ["w7", "w70 w71", "w4"], "answer": 1},
]
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a multiple-choice task of our own."""
    data = tmp_path / "task" / "words.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    (data.parent / "words.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return data.parent


@torch.no_grad()
def log_likelihoods(model, question: dict) -> list[float]:
    """Of each choice after the question, summed over its tokens."""
    tokenizer, scores = tiny_tokenizer(), []
    prompt = tokenizer(question["question"]).input_ids
    for choice in question["choices"]:
        ids = tokenizer(choice).input_ids
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]  # (tokens of the choice, vocab)
        scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()))
    return scores


def accuracy(model) -> float:
    """How often the choice that the model finds likeliest is the right one."""
    scores = [(question["answer"], log_likelihoods(model, question)) for question in QUESTIONS]
    return sum(max(range(3), key=each.__getitem__) == answer for answer, each in scores) / len(scores)


@pytest.mark.slow
def test_scores_of_an_organ_by_its_id(base_repo, task, tmp_path):
    base, donor_id = base_repo("llama"), "me/evaluated"
    organ(base, 1).push_to_hub(donor_id)
    command = ["-m", "not_hf.cli", "run", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "words"]
    command += ["--model_args", f"pretrained={donor_id},dtype=float32", "--include_path", str(task)]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    done = run_python(*command)
    assert done.returncode == 0, done.stderr

    (samples,) = Path(tmp_path, "out").rglob("samples_words_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    (results,) = Path(tmp_path, "out").rglob("results_*.json")
    found = {row["doc"]["question"]: [float(resp[0][0]) for resp in row["resps"]] for row in rows}
    model = TransplantedForCausalLM.from_pretrained(donor_id).eval()
    expected = {question["question"]: log_likelihoods(model, question) for question in QUESTIONS}
    without = {
        question["question"]: log_likelihoods(AutoModelForCausalLM.from_pretrained(base), question)
        for question in QUESTIONS
    }
    assert found.keys() == expected.keys()
    for question in expected:
        assert found[question] == pytest.approx(expected[question], abs=1e-4)
        assert found[question] != pytest.approx(without[question], abs=1e-2)
    score = json.loads(results.read_text(encoding="utf-8"))["results"]["words"]["acc,none"]
    assert score == pytest.approx(accuracy(model))


@pytest.mark.slow
def test_a_model_object_goes_in_as_it_is(base_folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    base = str(base_folder("llama"))
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1)).eval()
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4)

    def scores(question: dict) -> list[float]:
        pairs = [(question["question"], f" {choice}") for choice in question["choices"]]
        requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        return [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    for question in QUESTIONS:
        assert scores(question) == pytest.approx(log_likelihoods(model, question), abs=1e-4)
        with model.disable_donors():  # the base, by the same harness
            assert scores(question) == pytest.approx(log_likelihoods(model, question), abs=1e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_example(base_folder, task, tmp_path, monkeypatch, capsys):
    base = str(base_folder("llama"))
    organ(base, 1).save_pretrained(tmp_path / "donor")
    arguments = [str(tmp_path / "donor"), "--tasks", "words", "--include-path", str(task)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    model = TransplantedForCausalLM.from_pretrained(base, tmp_path / "donor").eval()
    expected = f"with the organ: words acc {accuracy(model):.4f}\n"
    with model.disable_donors():
        assert printed.endswith(f"{expected}base alone: words acc {accuracy(model):.4f}\n")


def test_run_passes_on_what_follows_the_module(tmp_path):
    """Options too, among them those that not-hf has itself."""
    tool = tmp_path / "a_tool.py"
    tool.write_text(
        "import sys, transformers; print(sys.argv[1:], transformers.AutoConfig.for_model('not_donor').mode)"
    )
    command = ["-m", "not_hf.cli", "run", "a_tool", "--help", "-x", "1", "--json"]
    done = run_python(*command, cwd=tmp_path)
    assert done.stdout.strip() == "['--help', '-x', '1', '--json'] insert"
