"""`not-hf compare`: its table, its files, and how times are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from not_hf.cli.compare import _seconds
from testing.commands import done, failed, invoke
from testing.donors import organ
from testing.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16, two donors of which one does not fit it, and three texts of which one is too short."""
    folder = tmp_path_factory.mktemp("files")
    for name, width in (("base", 32), ("wide", 64)):
        tiny_model("llama", hidden_size=width).bfloat16().save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        organ(folder / name, 1).save_pretrained(folder / f"{name}-organ")
    for name, step, count in (("mine", 1, 60), ("general", 3, 20), ("short", 1, 2)):
        lines = (" ".join(f"w{3 + (7 * line + step * n) % 88}" for n in range(39)) for line in range(count))
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_compare(files, tmp_path):
    out = tmp_path / "out"
    given = ("--data", files / "mine.txt", "--control", files / "general.txt", "--donor", files / "base-organ")
    shown = done("compare", files / "base", *given, "--budget", "3s", "-o", out)
    methods = ["base", "organ", "LoRA", "full fine-tuning", "donor base-organ"]
    assert [row["method"] for row in shown["rows"]] == methods
    size = (files / "base-organ/model.safetensors").stat().st_size
    assert 0.8 * size < shown["rows"][-1]["saved_bytes"] < size
    assert (shown["budget"], shown["folder"], shown["skipped"]) == (3, str(out), [])
    saved = json.loads((out / "compare.json").read_text())
    assert (saved["model"], saved["data"], saved["control"]) == ("base", "mine.txt", "general.txt")
    assert "mine.txt" in (out / "compare.md").read_text() and (out / "compare.png").exists()
    assert "is not empty" in failed("compare", files / "base", *given, "-o", out)


@pytest.mark.slow
def test_the_table_without_control_and_folder(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("compare", files / "base", "--data", files / "mine.txt", "--budget", "2s", "--no-full")
    assert result.exit_code == 0, result.stderr
    assert all(each in result.stdout for each in ("LoRA", "perplexity", "memory, MB"))
    assert "full fine-tuning" not in result.stdout and "control" not in result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_times(text, seconds):
    assert _seconds(text) == seconds


@pytest.mark.parametrize("budget", ["10", "ten", "0s", "-5m", "1d", ""])
def test_a_wrong_time_is_wrong_usage(budget, files, tmp_path):
    arguments = ("--data", files / "mine.txt", f"--budget={budget}", "-o", tmp_path / "out")
    result = invoke("compare", files / "base", *arguments)
    assert (result.exit_code, result.stdout) == (2, "") and "90s, 10m or 2h" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"--data": "short.txt"}, "the text has 80 tokens"),
        ({"--data": "none.txt"}, "none.txt"),
        ({"--control": "short.txt"}, "the control text has fewer than"),
        ({"--donor": "wide-organ"}, "donor wide-organ: donor hidden_size 64 does not fit"),
        ({"base": "base-organ"}, "is a donor; give the model that it was cut from"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(change, reason, files, tmp_path):
    given = {"base": "base", "--data": "mine.txt", **change}
    base, options = files / given.pop("base"), [each for key, name in given.items() for each in (key, files / name)]
    assert reason in failed("compare", base, *options, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
