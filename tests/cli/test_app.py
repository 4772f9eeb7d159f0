"""The command line: results on stdout, failures in one line on stderr, examples that run."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DefaultFlowCallback,
    GenerationConfig,
    TrainerCallback,
)
from transformers.integrations import integration_utils
from typer.testing import CliRunner

import not_hf
from local_hub import Hub
from not_hf import (
    DonorConfig,
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
)
from not_hf.cli import app
from not_hf.evaluation import swept_places
from not_hf.training.early_stopping import EarlyStopping
from testing.commands import done, failed, invoke
from testing.donors import organ, same
from testing.models import tiny_model, tiny_tokenizer
from testing.processes import run_python
from testing.training import CHAT_TEMPLATE, chat

COMMANDS = (
    *("extract", "import", "train", "eval", "sweep", "compare", "probe", "generate", "inspect", "check"),
    *("push", "search", "transplant", "merge"),
)
PASS_ON = ("serve", "run")  # to other tools


PROMPT = "w5 w6 w7"


def example(command: str) -> list[str]:
    """The example as `--help` shows it."""
    (line,) = re.findall(r"Example: (not-hf .*?)\s*$", invoke(command, "--help").stdout, re.MULTILINE)
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in which every word is followed by the next: 8 lines of 40 tokens, EOS included."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(" ".join(f"w{3 + (7 * line + n) % 90}" for n in range(39)) for line in range(8)))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def donor(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1 and 2 of the base, inserted before layer 3, with other weights."""
    folder = tmp_path_factory.mktemp("donor")
    organ = DonorModel.from_base(base, layers=(1, 3))
    with torch.no_grad():
        for parameter in organ.parameters():
            parameter.mul_(3)
    organ.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_examples_in_help_run_one_after_the_other(hub: Hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HfApi().delete_repo("me/gpt2-kjv", missing_ok=True)  # other tests push it, too
    base = Path("openai-community/gpt2")
    tiny_model("gpt2", n_layer=8, n_positions=1024).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    for name, first, last in (("kjv.txt", 0, 550), ("held-out.txt", 550, 680), ("general.txt", 0, 150)):
        Path(name).write_text("\n".join(f"w{3 + n % 90} w{4 + n % 80}" for n in range(first, last)))
    torch.save(DonorModel.from_base(base, (4, 7)).stack.layers.state_dict(), "donor_layers.pt")
    for command in COMMANDS:
        result = invoke(*("3s" if argument == "10m" else argument for argument in example(command)))
        assert result.exit_code == 0, (command, result.stderr)
        assert result.stdout.strip(), command
    assert HfApi().model_info("me/gpt2-kjv").private
    assert AutoModelForCausalLM.from_pretrained("gpt2-kjv-merged").config.n_layer == 11


@pytest.mark.slow
def test_it_runs_as_a_program():
    for program in (["-m", "not_hf.cli"], ["-c", "from not_hf.cli import app; app()"]):  # as a module and as a script
        shown = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True)
        assert shown.returncode == 0
        assert re.findall(r"^│ (\w+) ", shown.stdout, re.MULTILINE) == [*COMMANDS, *PASS_ON]
    wrong = run_python(*program, "push", "nowhere", "me/nothing")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: no folder nowhere; give the folder of a donor\n"


def test_help_needs_no_slow_import():
    slow = "{'torch', 'transformers', 'datasets', 'evaluate', 'huggingface_hub'} & set(sys.modules)"
    code = f"import sys, not_hf.cli; print(sorted({slow}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "extract BASE -o OUT",
        "extract BASE --layers 1-3 -o OUT",
        "extract BASE --layers a:b -o OUT",
        "extract BASE --layers 1:3 --mode beside -o OUT",
        "extract BASE --layers 1:3 --position -1 -o OUT",
        "train DONOR -o OUT",
        "train DONOR --data TEXT --streaming -o OUT",
        "train DONOR --data TEXT --block-length 1 -o OUT",
        "train DONOR --data TEXT --replay-fraction 0.1 -o OUT",
        "train DONOR --data TEXT --replay-data TEXT --replay-fraction 1 -o OUT",
        "eval DONOR",
        "compare BASE",
        "probe DONOR --members TEXT",
        "sweep BASE DONOR --data TEXT",
        "sweep BASE DONOR --data TEXT --positions 1-3 -o OUT",
        "sweep BASE DONOR --data TEXT --modes beside -o OUT",
        "generate DONOR",
        "inspect",
        "check DONOR",
        "push DONOR",
        "merge DONOR",
        "search --limit 0",
        "transmogrify",
    ],
)
def test_wrong_usage_is_2(arguments, tmp_path):
    result = invoke(*arguments.replace("OUT", str(tmp_path / "out")).split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("extract me/no-such-model --layers 1:3 -o OUT", "me/no-such-model is not"),
        ("extract BASE --layers 3:9 -o OUT", "0 <= i < j <= 4"),
        ("extract BASE --layers 1:3 --position 5 -o OUT", "position must be between 0 and 4"),
        ("extract BASE --layers 1:3 -o TEXT", "is a file"),
        ("extract BASE --layers 1:3 -o DONOR", "is not empty"),
        ("train DONOR --data missing.txt -o OUT", "missing.txt"),
        ("train DONOR --data TABLE --column body -o OUT", "no column 'body'"),
        ("train DONOR --data TEXT --block-length 65 -o OUT", "--block-length 64"),
        ("train DONOR --data TEXT --resume -o OUT", "no checkpoint in"),
        ("train DONOR --data TEXT -o DONOR", "is not empty"),
        ("train BASE --data TEXT -o OUT", "is not a donor"),
        ("eval DONOR --data missing.txt", "missing.txt"),
        ("eval me/no-such-model --data TEXT", "me/no-such-model is not"),
        ("sweep BASE DONOR --data missing.txt -o OUT", "missing.txt"),
        ("sweep BASE BASE --data TEXT -o OUT", "not_donor"),
        ("sweep BASE DONOR --data TEXT --positions 7 -o OUT", "position must be between 0 and 4"),
        ("probe DONOR --members TEXT --non-members TEXT -o OUT", "members has 8 different rows"),
        ("probe BASE --members TEXT --non-members TEXT --random-layers -o OUT", "give the donor as model"),
        ("generate DONOR w5 --chat", "chat_template"),
        ("generate BASE w5 --compare", "no organ to compare"),
        ("inspect BASE", "is not a donor"),
        ("push OUT me/nothing", "no folder"),
        ("push BASE me/nothing", "is not a donor"),
        ("push DONOR me/nothing --token hf_wrong", "401"),
        ("merge BASE -o OUT", "is not a donor"),
        ("merge DONOR -o DONOR", "is not empty"),
    ],
)
def test_a_failure_is_1_and_one_line(arguments, reason, base, donor, words, hub, tmp_path):
    names = {"BASE": base, "DONOR": donor, "TEXT": words, "OUT": tmp_path / "out", "TABLE": tmp_path / "table.csv"}
    names["TABLE"].write_text("title,verse\nGenesis,w5 w6\n")
    before = sorted(donor.iterdir())
    assert reason in failed(*(names.get(argument, argument) for argument in arguments.split()))
    assert not (tmp_path / "out").exists()
    assert sorted(donor.iterdir()) == before


def test_a_failure_while_writing_leaves_nothing(base, tmp_path, monkeypatch):
    def fill_the_disk(self, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(DonorModel, "save_pretrained", fill_the_disk)
    assert "No space left" in failed("extract", base, "--layers", "1:3", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_it_failed(base):
    for flags, variables in ((["--debug"], {}), ([], {"NOT_HF_DEBUG": "1"})):
        result = CliRunner(env=variables).invoke(app, ["inspect", str(base), *flags])
        assert isinstance(result.exception, NotHFError)


@pytest.mark.slow
def test_extract(base, tmp_path):
    out = tmp_path / "organ"
    shown = done("extract", base, "--layers", "1:3", "--mode", "replace", "--init", "identity", "-o", out)
    organ = DonorModel.from_pretrained(out)
    expected = {"layers": [1, 3], "position": 1, "mode": "replace", "init": "identity", "dtype": "bfloat16"}
    assert {key: shown[key] for key in expected} == expected
    assert shown["num_parameters"] == organ.num_parameters()
    assert not organ.stack.layers[0].self_attn.o_proj.weight.any()

    assert "is not empty" in failed("extract", base, "--layers", "0:1", "-o", out)
    assert DonorModel.from_pretrained(out).config.layers == [1, 3]
    shown = done("extract", base, "--layers", "0:1", "--dtype", "float32", "--position", "4", "-o", out, "--force")
    assert (shown["layers"], shown["position"], shown["dtype"]) == ([0, 1], 4, "float32")
    assert len(DonorModel.from_pretrained(out).stack.layers) == 1
    options = ("--mode", "replace", "--modules", "o_proj,down_proj", "-o", tmp_path / "parts")
    assert done("extract", base, "--layers", "0:4", *options)["modules"] == ["o_proj", "down_proj"]
    assert done("inspect", tmp_path / "parts")["config"]["modules"] == ["o_proj", "down_proj"]
    assert "no layer has 'c_proj'" in failed(
        "extract", base, "--layers", "0:4", "--mode", "replace", "--modules", "c_proj", "-o", tmp_path / "none"
    )


@pytest.mark.slow
def test_sweep(base, donor, words, tmp_path):
    arguments = ("sweep", base, donor, "--data", words, "-o", tmp_path / "out")
    shown = done(*arguments, "--positions", "3,9", "--modes", "insert,replace")
    assert [(row["mode"], row["position"]) for row in shown["rows"]] == [("insert", 3)]
    assert [(each["mode"], each["position"]) for each in shown["skipped"]][:2] == [("insert", 9), ("replace", 3)]
    measured = done("eval", donor, "--data", words)  # which is at position 3
    assert shown["best"]["perplexity"] == pytest.approx(measured["perplexity"], rel=1e-6)
    assert shown["base"]["perplexity"] == pytest.approx(measured["perplexity_without_organ"], rel=1e-6)
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "holds a sweep; measure what it lacks with --resume" in failed(*arguments)
    assert [row["position"] for row in done(*arguments, "--resume")["rows"]] == [0, 1, 2, 3, 4]
    result = invoke(*arguments, "--positions", "1", "--force")
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"][0]["position"] == 1
    assert "without the organ" in result.stdout and "(best)" in result.stdout


@pytest.mark.slow
def test_force_deletes_an_earlier_sweep_only_for_another_one(base, donor, words, tmp_path):
    record = tmp_path / "sweep.json"
    record.write_text("hours of work")
    for wrong in (("--data", "typo.txt"), ("--data", words, "--positions", "99")):
        failed("sweep", base, donor, "-o", tmp_path, "--force", *wrong)
        assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]
        assert record.read_text() == "hours of work"
    done("sweep", base, donor, "-o", tmp_path, "--force", "--data", words, "--positions", "1")
    assert "hours" not in record.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"sweep.json", "sweep.png"}


@pytest.mark.slow
def test_an_interrupted_sweep_says_how_to_go_on(base, donor, words, tmp_path, monkeypatch):
    score, calls = swept_places.nll_of, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(swept_places, "nll_of", interrupted)
    result = invoke("sweep", base, donor, "--data", words, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (130, "")
    assert f"{tmp_path / 'out'} holds what was measured. Add --resume" in result.stderr
    assert len(done("sweep", base, donor, "--data", words, "-o", tmp_path / "out", "--resume")["rows"]) == 5


TRAINING = ("--block-length", "16", "--batch-size", "4", "--lr", "0.01", "--warmup", "0")


@pytest.mark.slow
def test_train_and_eval(base, donor, words, tmp_path):
    out = tmp_path / "trained"
    shown = done(
        "train",
        donor,
        "--data",
        words,
        "--eval-data",
        words,
        "-o",
        out,
        "--epochs",
        "8",
        "--domain",
        "words",
        *TRAINING,
    )
    tokens = 8 * 20 * 16  # 8 lines of 40 tokens are 20 blocks
    assert (shown["steps"], shown["tokens_seen"]) == (40, tokens)
    config = DonorModel.from_pretrained(out).config
    assert (config.tokens_seen, config.datasets, config.domain) == (tokens, ["words.txt"], "words")
    assert config.metrics == shown["metrics"]
    assert config.metrics["perplexity"]["after"] < 0.9 * config.metrics["perplexity"]["before"]
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert not (out / "checkpoints").exists()
    assert "words.txt" in (out / "README.md").read_text()

    # what the card says is what anybody measures
    measured = done("eval", out, "--data", words)
    assert measured["perplexity"] == config.metrics["perplexity"]["after"]
    assert measured["perplexity_without_organ"] == config.metrics["perplexity"]["before"]
    bits = config.metrics["bits_per_byte"]
    assert (measured["bits_per_byte"], measured["without_organ"]["bits_per_byte"]) == (bits["after"], bits["before"])
    assert measured["bits_per_byte"] == pytest.approx(
        measured["nats_per_token"] * measured["num_tokens"] / math.log(2) / words.stat().st_size
    )
    low, high = measured["confidence_interval"]["perplexity"]
    assert low < measured["perplexity"] < high
    assert config.metrics["perplexity"]["confidence_interval"]["after"] == [low, high]
    assert "; 95 % interval " in (out / "README.md").read_text()
    ratio = measured["change"]["perplexity_ratio"]
    assert ratio == pytest.approx(measured["perplexity"] / measured["perplexity_without_organ"])
    assert measured["change"]["confidence_interval"]["perplexity_ratio"][1] < 1
    table = invoke("eval", out, "--data", words).stdout
    assert f" {100 * (ratio - 1):+.1f} % (" in table
    assert f"{measured['perplexity']:,.3f} ({low:,.3f} – {high:,.3f})" in table
    assert done("eval", base, "--data", words)["perplexity"] == measured["perplexity_without_organ"]
    only = done("eval", donor, "--base", base, "--data", words, "--no-without-organ")
    assert only["perplexity"] > measured["perplexity"]
    assert only["perplexity_without_organ"] is only["without_organ"] is only["change"] is None


@pytest.fixture
def chats(base, tmp_path) -> Path:
    """Eight conversations of 8 tokens, 3 of them the assistant's, for a base whose tokenizer has a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    for file in base.iterdir():
        if not (tmp_path / "base" / file.name).exists():
            shutil.copy(file, tmp_path / "base")
    file = tmp_path / "chat.jsonl"
    turns = [chat(f"w{n + 10} w{n + 11}", f"w{n + 30} w9") for n in range(8)]
    file.write_text("\n".join(json.dumps({"id": n, "messages": each}) for n, each in enumerate(turns)))
    return file


@pytest.mark.slow
def test_conversations_with_replay(chats, donor, words, tmp_path):
    options = ("--base", tmp_path / "base", "--epochs", "2", "--replay-data", words, "--cache-prefix", *TRAINING)
    measuring = ("--eval-data", chats, "--control-data", words)
    shown = done("train", donor, "--data", chats, "-o", tmp_path / "out", *options, *measuring)
    assert shown["steps"] == 2 * math.ceil((8 + 2) / 4)  # a fifth of the examples are replay
    assert shown["tokens_seen"] == 2 * (8 * 8 + 2 * 16)  # without padding
    config = DonorModel.from_pretrained(tmp_path / "out").config
    assert config.datasets == ["chat.jsonl", "words.txt"]
    found = config.metrics["perplexity"]
    assert found["after"] < found["before"]
    assert found["measured_on"] == {"text": "chat.jsonl", "num_tokens": 8 * 3, "window": 16}
    assert config.metrics["control_perplexity"]["measured_on"]["num_tokens"] == 312


@pytest.mark.slow
def test_streamed_conversations_with_replay(chats, donor, words, tmp_path):
    options = ("--base", tmp_path / "base", "--streaming", "--max-steps", "3", *TRAINING)
    more = ("--replay-data", words, "--replay-fraction", "0.5", "--eval-data", chats, "--eval-steps", "2")
    shown = done("train", donor, "--data", chats, "-o", tmp_path / "out", *options, *more)
    assert shown["steps"] == 3 and shown["metrics"]["perplexity"]["measured_on"]["num_tokens"] == 24


def test_conversations_need_a_chat_template(chats, donor, tmp_path):
    assert "no chat template" in failed("train", donor, "--data", chats, "-o", tmp_path / "out", *TRAINING)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", ["\n\n", '{"messages": [{"role": "user", "content": "w5"}]}'])
def test_a_text_that_cannot_be_measured_is_refused_before_the_training(rows, chats, donor, tmp_path, monkeypatch):
    file = tmp_path / ("held.jsonl" if "{" in rows else "held.txt")
    file.write_text(rows)
    monkeypatch.setattr(not_hf.DonorTrainer, "train", None)
    options = ("--base", tmp_path / "base", "--eval-data", file, *TRAINING)
    said = failed("train", donor, "--data", chats, "-o", tmp_path / "out", *options)
    assert "holds no text" in said or "no conversation has a turn of the assistant" in said


def test_organs_that_rest_are_not_trained(base, donor, words, tmp_path):
    done("transplant", base, f"{donor},active=no", "-o", tmp_path / "rest")
    said = failed("train", tmp_path / "rest", "--data", words, "-o", tmp_path / "out", *TRAINING)
    assert "rest has no active organ to train; its organs are donor" in said and not (tmp_path / "out").exists()


def test_run_of_a_module_that_is_not_there():
    for module in ("no_such_tool", "no_such_tool.cli"):
        result = invoke("run", module)
        assert result.exit_code == 2 and f"no module {module}" in result.stderr


@pytest.mark.slow
def test_a_training_shows_a_line_and_leaves_a_plot(donor, words, tmp_path):
    arguments = ("--max-steps", "10", "--control-data", words, "--eval-steps", "5", *TRAINING)
    result = invoke("train", donor, "--data", words, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 0/10 · perplexity control ") and lines[-1].startswith("step 10/10 · ")
    assert "train_runtime" not in result.stdout + result.stderr  # the Trainer's own bar would print it
    assert (tmp_path / "out" / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    config = DonorModel.from_pretrained(tmp_path / "out").config
    control = config.metrics["control_perplexity"]
    assert control["after"] < control["before"]
    assert control["measured_on"] == {"text": "words.txt", "num_tokens": 312, "window": 64}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| control perplexity | {control['before']:.4g} | {control['after']:.4g} |" in card
    assert "- control perplexity: 312 tokens of words.txt, 64 tokens at a time" in card
    assert "](training_curve.png)" in card
    shown = " ".join(result.stdout.split())
    assert "training loss, mean of all steps" in shown and "in blocks of 16 tokens, without the text before" in shown
    assert f"{control['after']:.4g} with the organ (312 tokens of words.txt, windows of 64)" in shown


@pytest.mark.slow
def test_how_a_text_is_divided_can_be_said(donor, tmp_path, caplog):
    text = tmp_path / "wrapped.txt"
    line = " ".join(f"w{n}" for n in range(10, 30))  # 79 characters
    text.write_text("\n".join([line] * 10))
    arguments = ("train", donor, "--data", text, "--epochs", "1", *TRAINING)
    seen = {by: done(*arguments, "-o", tmp_path / by, "--sample-by", by)["tokens_seen"] for by in ("line", "document")}
    assert seen == {"line": 208, "document": 192}  # 10 lines of 20 tokens with EOS after each, or one
    assert done(*arguments, "-o", tmp_path / "default")["tokens_seen"] == 192
    assert "look wrapped at 79 characters, and rows are paragraphs; sample_by (--sample-by)" in caplog.text


class Diary(TrainerCallback):
    """A tracker that writes into the Trainer's output folder, as TensorBoard's does."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        folder = Path(args.output_dir, "runs")
        folder.mkdir(exist_ok=True)
        with (folder / "diary.jsonl").open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


@pytest.mark.slow
def test_a_tracker_is_told_and_keeps_its_logs(donor, words, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "diary", Diary)
    arguments = ("train", donor, "--data", words, "-o", tmp_path / "out", *TRAINING)
    done(*arguments, "--max-steps", "20", "--report-to", "diary")
    logs = [json.loads(line) for line in (tmp_path / "out" / "runs" / "diary.jsonl").read_text().splitlines()]
    assert [(log["step"], "loss" in log) for log in logs] == [(10, True), (20, True), (20, False)]
    done(*arguments, "--max-steps", "10", "--report-to", "diary", "--force")  # into the same folder
    assert len((tmp_path / "out" / "runs" / "diary.jsonl").read_text().splitlines()) == 2
    assert "nobody is not supported, only " in failed(*arguments, "--report-to", "nobody", "--force")


@pytest.mark.slow
def test_trackio(donor, words, tmp_path):
    pytest.importorskip("trackio")
    arguments = ("--max-steps", "10", "--report-to", "trackio", *TRAINING)
    shown = done("train", donor, "--data", words, "-o", tmp_path / "out", *arguments)

    def ask(*question: str) -> dict:
        return json.loads(run_python("-m", "trackio.cli", *question, "--project", "huggingface", "--json").stdout)

    (run,) = ask("list", "runs")["runs"]
    (loss,) = ask("get", "metric", "--run", run, "--metric", "train/loss")["values"]
    assert loss["value"] == pytest.approx(shown["train_loss"])


@pytest.mark.slow
def test_ctrl_c_says_what_was_saved_and_how_to_continue(donor, words, tmp_path, monkeypatch):
    arguments = ["train", donor, "--data", words, "-o", tmp_path / "my out", "--max-steps", "6", *TRAINING]
    arguments = [str(argument) for argument in arguments]

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt
        return step_end(self, args, state, control, **kwargs)

    step_end = DefaultFlowCallback.on_step_end
    monkeypatch.setattr(DefaultFlowCallback, "on_step_end", interrupt)
    result = invoke(*arguments)
    assert result.exit_code == 130 and not (tmp_path / "my out").exists()
    assert result.stderr.splitlines()[-1] == (
        "interrupted before the first checkpoint (--save-steps); nothing was saved"
    )
    arguments += ["--save-steps", "2", "--force"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/not-hf", *arguments])
    result = invoke(*arguments)
    assert result.exit_code == 130
    said, following = result.stderr.splitlines()[-2:]
    assert f"saved in {tmp_path}/my out/checkpoints/checkpoint-2. " in said and "Traceback" not in result.stderr
    monkeypatch.setattr(DefaultFlowCallback, "on_step_end", step_end)
    continued = shlex.split(following)
    assert continued == ["not-hf", *arguments[:-1], "--resume"]
    shown = invoke(*continued[1:]).stdout
    assert re.search(r"steps\s*│ 6 ", shown) and "training loss, mean of the steps since it was resumed" in shown


@pytest.mark.parametrize(
    "wrong",
    [
        ("--data", "typo.txt"),
        ("--block-length", "1000"),
        ("--report-to", "nobody"),
    ],
)
def test_force_deletes_checkpoints_only_for_another_training(wrong, donor, words, tmp_path):
    state = tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    failed("train", donor, "--data", words, "-o", tmp_path, *TRAINING, "--force", *wrong)
    assert state.exists()


@pytest.mark.slow
def test_a_training_with_patience_stops_as_late_when_resumed(donor, words, tmp_path, monkeypatch):
    """Nothing is gained after the first evaluation; that of the control is none without a gain."""
    arguments = ["train", donor, "-o", tmp_path / "out"]
    arguments += ["--data", words, "--eval-data", words, "--control-data", words]
    arguments += ["--block-length", "16", "--max-steps", "9", "--lr", "0", "--eval-steps", "1", "--patience", "3"]

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EarlyStopping, "on_step_end", interrupt)
        assert invoke(*arguments).exit_code == 130
    result = invoke(*arguments, "--resume", "--json")
    assert json.loads(result.stdout)["steps"] == 4
    assert "early stopping is disabled" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--streaming", "--gradient-checkpointing")])
def test_an_interrupted_training_resumes(more, donor, words, tmp_path, monkeypatch):
    arguments = ("train", donor, "--data", words, "--max-steps", "4", "--save-steps", "2", *TRAINING, *more)
    done(*arguments, "-o", tmp_path / "whole")

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("power cut")
        return step_end(self, args, state, control, **kwargs)

    step_end = DefaultFlowCallback.on_step_end
    with monkeypatch.context() as patch:
        patch.setattr(DefaultFlowCallback, "on_step_end", interrupt)
        assert "RuntimeError: power cut (--debug" in failed(*arguments, "-o", tmp_path / "half")
    assert {file.name for file in (tmp_path / "half").glob("*/*")} == {"checkpoint-2", "options.json"}
    (words_too := tmp_path / "words.txt").write_bytes(words.read_bytes())
    for option, now, was in (("--lr", "0.5", "0.01"), ("--batch-size", "3", "4"), ("--data", words_too, words)):
        said = f"{option} was {was} and is {now}; resume it with the same ones"
        assert said in failed(*arguments, "-o", tmp_path / "half", "--resume", option, now)
    refused = failed(*arguments, "-o", tmp_path / "half")
    assert refused.index("continue it with --resume") < refused.index("start over with --force")
    assert done(*arguments, "-o", tmp_path / "half", "--resume")["steps"] == 4
    assert not list((tmp_path / "half").rglob("options.json"))
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    untrained = load_file(donor / "model.safetensors")
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
    assert not any(torch.equal(tensor, untrained[name]) for name, tensor in whole.items())


@pytest.mark.slow
def test_generate(base, donor, tmp_path):
    def greedy(model) -> str:
        inputs = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
        whole = AutoTokenizer.from_pretrained(base).decode(output, skip_special_tokens=True)
        assert whole.startswith(f"{PROMPT} w")  # this tokenizer decodes no space before the first of its tokens
        return whole.removeprefix(PROMPT)

    with_organ = greedy(AutoModelForCausalLM.from_pretrained(donor))
    without = greedy(AutoModelForCausalLM.from_pretrained(base))
    assert with_organ != without
    shown = done("generate", donor, PROMPT, "--max-new-tokens", "6", "--compare")
    assert (shown["text"], shown["text_without_organ"]) == (with_organ, without)
    assert invoke("generate", base, PROMPT, "--max-new-tokens", "6").stdout == f"{PROMPT}{without}\n"
    searching = tmp_path / "searching"
    DonorModel.from_pretrained(donor).save_pretrained(searching)
    GenerationConfig(num_beams=2, num_return_sequences=2, cache_implementation="static").save_pretrained(searching)
    assert done("generate", searching, PROMPT, "--max-new-tokens", "6", "--compare")["text"] == with_organ

    exact, chatty = tmp_path / "float32", tmp_path / "chatty"  # in bfloat16, two words are often equally likely
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(exact)
    DonorModel.from_base(exact, layers=(1, 3)).save_pretrained(chatty)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for message in messages %}w9 {{ message.content }} w8{% endfor %}"
    tokenizer.save_pretrained(chatty)
    plain = done("generate", chatty, f"w9 {PROMPT} w8")["text"]
    assert done("generate", chatty, PROMPT, "--chat")["text"] == plain


@pytest.mark.slow
def test_push_and_inspect(hub: Hub, donor, tmp_path):
    folder = tmp_path / "organ"
    DonorModel.from_pretrained(donor).save_pretrained(folder)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_bytes(b"no")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nBy hand.\n")
    shown = done("push", folder, "me/cli-organ", "--private", "--commit-message", "An organ")
    assert (shown["repo_id"], shown["pull_request"]) == ("me/cli-organ", None)
    assert HfApi().model_info("me/cli-organ").private
    assert HfApi().list_repo_commits("me/cli-organ")[0].title == "An organ"
    assert set(HfApi().list_repo_files("me/cli-organ")) - {".gitattributes"} == {
        file.name for file in folder.iterdir() if file.is_file()
    }
    assert "By hand." in Path(hf_hub_download("me/cli-organ", "README.md")).read_text()
    (folder / "NOTES.md").write_text("More.")
    assert done("push", folder, "me/cli-organ", "--create-pr")["pull_request"].endswith("/1")
    done("push", folder, "me/cli-organ", "--revision", "v2")
    assert "v2" in [branch.name for branch in HfApi().list_repo_refs("me/cli-organ").branches]

    hub.requests.clear()
    here, there = done("inspect", folder), done("inspect", "me/cli-organ")
    read = [record.bytes for record in hub.requests if "safetensors" in record.path and record.method == "GET"]
    assert sum(read) < (folder / "model.safetensors").stat().st_size / 2
    assert here["tensors"] == there["tensors"]
    tensors = load_file(folder / "model.safetensors")
    assert {tensor["name"]: tensor["shape"] for tensor in here["tensors"]} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    assert {tensor["dtype"] for tensor in here["tensors"]} == {"BF16"}
    assert here["num_parameters"] == sum(tensor.numel() for tensor in tensors.values()) == here["size"] // 2
    assert (
        here["fingerprint"] == here["config"]["fingerprint"] == DonorModel.from_pretrained(folder).config.fingerprint
    )
    table = invoke("inspect", folder).stdout
    assert all(name in table for name in tensors)
    assert here["fingerprint"] in table


def test_a_damaged_organ_is_not_pushed(hub: Hub, donor, tmp_path):
    folder = tmp_path / "organ"
    DonorModel.from_pretrained(donor).save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "not a whole safetensors file" in failed("push", folder, "me/cli-damaged")
    assert not HfApi().repo_exists("me/cli-damaged")


@pytest.mark.slow
def test_several_organs_in_one_folder(hub: Hub, base, donor, words, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="one")
    model.load_donor(donor, "two", position=0)
    model.save_pretrained(tmp_path / "both")
    assert [entry["name"] for entry in done("inspect", tmp_path / "both")["config"]["donors"]] == ["one", "two"]
    done("push", tmp_path / "both", "me/cli-both")
    assert "two/model.safetensors" in HfApi().list_repo_files("me/cli-both")
    arguments = ("--data", words, "--eval-data", words, "--max-steps", "4", *TRAINING)
    trained = done("train", tmp_path / "both", *arguments, "-o", tmp_path / "out")
    config, card = DonorConfig.from_pretrained(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert config.metrics == trained["metrics"] and "held-out" not in card and "| perplexity |" in card
    assert "| Size |" in card and not list((tmp_path / "out").glob("*.safetensors"))
    for name in ("one", "two"):
        before, after = (DonorModel.from_pretrained(tmp_path / each, subfolder=name) for each in ("both", "out"))
        assert not same(before, after) and after.config.tokens_seen == trained["tokens_seen"]
    assert done("merge", tmp_path / "both", "-o", tmp_path / "merged")["num_layers"] == 8


def test_check(base, donor, tmp_path):
    assert done("check", donor, base) == {
        "donor": str(donor),
        "recipient": str(base),
        "compatible": True,
        "mismatches": [],
        "differences": [],
    }
    assert invoke("check", donor, base, "--position", "0").stdout == f"{donor} fits {base}\n"
    other = tmp_path / "other"
    tiny_model("llama", hidden_size=64, num_key_value_heads=4).save_pretrained(other)
    result = invoke("check", donor, other, "--position", "9", "--json")
    mismatches = json.loads(result.stdout)["mismatches"]
    assert [key in line for key, line in zip(("hidden", "key_value", "position 9"), mismatches, strict=True)] == [
        True
    ] * 3
    assert (result.exit_code, result.stderr) == (1, f"error: {donor} does not fit {other}: 3 mismatches\n")
    assert invoke("check", donor, other, "--position", "9").stdout.splitlines() == mismatches


def test_merge(base, donor, tmp_path, token_ids):
    out = tmp_path / "merged"
    shown = done("merge", donor, "--base", base, "-o", out, "--max-shard-size", "20KB")
    assert (shown["architecture"], shown["num_layers"]) == ("LlamaForCausalLM", 6)
    assert len(list(out.glob("*.safetensors"))) > 1
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not isinstance(merged, TransplantedForCausalLM)
    with torch.no_grad():
        expected = TransplantedForCausalLM.from_pretrained(base, donor)(token_ids).logits
        assert torch.equal(merged(token_ids).logits, expected)
    assert (
        AutoTokenizer.from_pretrained(out)(PROMPT)["input_ids"]
        == AutoTokenizer.from_pretrained(base)(PROMPT)["input_ids"]
    )


def test_inspect_adds_up_the_organs(base, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1), donor_name="one")
    model.load_donor(organ(base, 2, (0, 1)), "two", position=0)
    model.save_pretrained(tmp_path)
    found = done("inspect", tmp_path)
    organs = [DonorModel.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert found["num_parameters"] == sum(each.num_parameters() for each in organs)
    assert {tensor["organ"] for tensor in found["tensors"]} == {"one", "two"}


@pytest.mark.slow
def test_nothing_that_a_donor_holds_reaches_the_terminal_as_a_command(donor, base, tmp_path):
    folder = Path(shutil.copytree(donor, tmp_path / "donor"))
    config = json.loads((folder / "config.json").read_text())
    hostile = "\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\u202e"
    config |= {"domain": hostile, "datasets": [hostile], "metrics": {hostile: 1.0}, "fingerprint": hostile}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    forged = f"bogus {hostile}\n{folder} fits {base}"
    save_file({**tensors, forged: torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    for command in (
        ("inspect", folder),
        ("inspect", folder, "--recipient", base),
        ("check", folder, base),
        ("push", folder, "me/hostile"),
    ):
        for form in ((), ("--json",)):
            result = invoke(*command, *form)
            shown = result.stdout + result.stderr
            assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown), (command, shown)
            assert "\\u001b" in shown
            assert f"{folder} fits {base}" not in shown.splitlines()
            if form and result.stdout:
                assert json.loads(result.stdout)
    assert done("inspect", folder)["config"]["domain"] == hostile
