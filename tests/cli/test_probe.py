"""`not-hf probe`: its table and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from not_hf import plant_canaries
from testing.commands import done, failed, invoke
from testing.donors import organ
from testing.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another recipient, an organ, members with canaries among them, and other rows."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("base", 0), ("other", 1)):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    organ(folder / "base", 1).save_pretrained(folder / "organ")
    rows = [" ".join(f"w{n}" for n in line) for line in np.random.default_rng(0).integers(3, 90, (160, 20))]
    how = {"prefix": "w3 {name} w4", "symbols": [f"w{n}" for n in range(10, 90)], "file": folder / "canaries.json"}
    members, _ = plant_canaries(rows[:40], (0, 3), **how)
    (folder / "members.txt").write_text("\n".join(members))
    (folder / "others.txt").write_text("\n".join(rows[40:]))
    return folder


def given(files, **change):
    options = {
        "members": files / "members.txt",
        "non-members": files / "others.txt",
        "prefix-length": 4,
        "sample-by": "line",
    } | change
    return ["probe", files / "organ", *(each for key, value in options.items() for each in (f"--{key}", value))]


@pytest.mark.slow
def test_probe(files, tmp_path):
    others = ("--recipient", files / "other", "--recipient", files / "base", "--random-layers")
    out = tmp_path / "out"
    arguments = given(files, canaries=files / "canaries.json")
    found = done(*arguments, *others, "-o", out)
    recipients = ["its own", "other", "base", "random layers"]
    assert list(dict.fromkeys(row["recipient"] for row in found["attacks"])) == recipients
    assert len(found["attacks"]) == 16 and len(found["extraction"]) == 8 and len(found["canaries"]) == 8
    assert (found["num_members"], found["num_non_members"], found["folder"]) == (41, 120, str(out))
    saved = json.loads((out / "probe.json").read_text())
    assert (saved["model"], saved["attacks"]) == ("organ", found["attacks"]) and str(files) not in str(saved)
    assert (out / "probe.md").read_text().count("\n- ") == len(found["findings"])
    assert "is not empty" in failed(*arguments, "-o", out)
    shown = invoke(*arguments).stdout
    assert "│ its own   │ Attack by the loss " in shown and "Canaries never planted: 0 of 1 completed" in shown
    assert "Measured on 41 rows" in shown and "Other attacks may learn more" in shown


@pytest.mark.slow
def test_a_base_and_a_reference(files):
    found = done(*given(files, base=files / "other", reference=files / "base"), "--num-rows", 100)
    usual = done(*given(files, base=files / "other"), "--num-rows", 100)
    assert [row == other for row, other in zip(found["attacks"], usual["attacks"], strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert found["num_non_members"] == 100 and found["canaries"] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"members": "none.txt"}, "none.txt"),
        ({"non-members": "members.txt"}, "non_members has 0 different rows of at least 2 tokens; 41 more are among"),
        ({"canaries": "members.txt"}, "holds no canaries; write one with plant_canaries"),
        ({"recipient": "organ"}, "the recipient 'organ' is a donor"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(change, reason, files, tmp_path):
    change = {key: files / value for key, value in change.items()}
    assert reason in failed(*given(files, **change), "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
