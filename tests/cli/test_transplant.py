"""`not-hf transplant`, and the other commands on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from local_hub import Hub
from not_hf import DonorModel, OrganSource, TransplantedForCausalLM, compose
from testing.commands import done, invoke


def cells(table: str) -> list[list[str]]:
    """The rows of the tables that were printed, without lines and titles."""
    lines = (line.replace("┃", "│") for line in table.splitlines() if line[:1] in "│┃")
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in lines]


@pytest.fixture(scope="module")
def base(base_repo) -> str:
    return base_repo("llama")


@pytest.fixture(scope="module")
def kjv(base) -> str:
    DonorModel.from_base(base, (1, 3)).push_to_hub("me/t-kjv")
    return "me/t-kjv"


@pytest.fixture(scope="module")
def law(base, tmp_path_factory) -> Path:
    """A folder with a comma in its name."""
    folder = tmp_path_factory.mktemp("organs") / "law,v2"
    donor = DonorModel.from_base(base, (0, 1), mode="replace")
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.mul_(2)
    donor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_it_writes_what_compose_would(base, kjv, law, token_ids, tmp_path):
    spec = f"{kjv},name=first,position=1,mode=replace,revision=main"
    shown = done("transplant", base, spec, law, f"{kjv},active=no", "-o", tmp_path / "out")
    compose(
        [OrganSource("first", kjv, position=1, mode="replace"), law, OrganSource("", kjv, active=False)], base
    ).save_pretrained(tmp_path / "expected")
    for name in ("config.json", "README.md", "law-v2/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert shown["folder"] == str(tmp_path / "out")
    assert (shown["base"], shown["base_revision"]) == (base, HfApi().model_info(base).sha)
    assert [
        {key: donor[key] for key in entry} for donor, entry in zip(shown["donors"], written["donors"], strict=True)
    ]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        by_hand = TransplantedForCausalLM.from_pretrained(base, kjv, donor_name="a", position=1, mode="replace")
        by_hand.load_donor(law, "b")
        assert model.active_donors == ["first", "law-v2"]
        assert torch.equal(model(token_ids).logits, by_hand(token_ids).logits)


@pytest.mark.slow
def test_a_dry_run_writes_nothing_and_prints_what_the_other_prints(base, kjv, law, tmp_path):
    arguments = ("transplant", base, kjv, f"{kjv},name=off,position=0,active=no", law, "-o", tmp_path / "out")
    dry, dry_table = done(*arguments, "--dry-run"), invoke(*arguments, "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    assert cells(invoke(*arguments).stdout)[1:] == cells(dry_table)[1:]  # but for the folder
    assert done(*arguments, "--force") == {**dry, "folder": str(tmp_path / "out")}
    assert dry["folder"] is None
    assert invoke("transplant", base, kjv, "--dry-run").exit_code == 0  # needs no folder

    assert (dry["num_layers_before"], dry["num_layers_after"]) == (4, 6)
    assert dry["stack"] == [
        {"layer": 0, "organ": "law-v2", "index": 0, "base_layer": 0},
        {"layer": 1, "organ": None, "index": 1, "base_layer": 1},
        {"layer": 2, "organ": None, "index": 2, "base_layer": 2},
        {"layer": 3, "organ": "t-kjv", "index": 0, "base_layer": 1},
        {"layer": 4, "organ": "t-kjv", "index": 1, "base_layer": 2},
        {"layer": 5, "organ": None, "index": 3, "base_layer": 3},
    ]
    sha, parameters = HfApi().model_info(kjv).sha, DonorModel.from_pretrained(kjv).num_parameters()
    rows = cells(dry_table)
    assert ["layers", "4 before, 6 after"] in rows
    expected = ["off (inactive)", kjv, sha[:12], "insert at 0", "[1, 3)", f"{parameters:,}", "0.1 MB"]
    assert expected in rows
    assert ["law-v2", "–", "replace at 0", "[0, 1)"] in [[row[0], *row[2:5]] for row in rows if len(row) == 7]
    assert "(copied in)" in dry_table
    stack = rows[rows.index(["layer", "from", "cut from"]) + 1 :]
    assert stack == [
        ["0", "law-v2 layer 0", "base layer 0"],
        ["1", "recipient layer 1", ""],
        ["2", "recipient layer 2", ""],
        ["3", "t-kjv layer 0", "base layer 1"],
        ["4", "t-kjv layer 1", "base layer 2"],
        ["5", "recipient layer 3", ""],
    ]


def test_without_a_recipient_it_is_the_base_and_embed_copies(base, kjv, tmp_path):
    shown = done("transplant", kjv, f"{kjv},name=again,position=4", "--embed", "-o", tmp_path / "out")
    assert (shown["base"], shown["num_layers_after"]) == (base, 8)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "again", "config.json", "t-kjv"]
    first = HfApi().list_repo_commits(base)[0].commit_id
    assert done("transplant", f"{base},revision={first}", kjv, "--dry-run")["base_revision"] == first


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("KJV", "--output"),
        ("BASE --dry-run", "name the donors after it"),
        ("BASE,position=1 KJV --dry-run", "takes a revision only"),
        ("BASE KJV,8 --dry-run", "'8' is not KEY=VALUE, where KEY is one of name, position, mode"),
        ("BASE KJV,position --dry-run", "'position' is not KEY=VALUE"),
        ("BASE KJV,position= --dry-run", "'position=' is not KEY=VALUE"),
        ("BASE KJV,pos=8 --dry-run", "'pos=8' is not KEY=VALUE"),
        ("BASE KJV,position=-1 --dry-run", "position '-1' must be a whole number from 0"),
        ("BASE KJV,position=² --dry-run", "position '²' must be a whole number from 0"),
        ("BASE KJV,mode=graft --dry-run", "mode 'graft' must be insert or replace"),
        ("BASE KJV,scale=half --dry-run", "scale 'half' must be a number"),
        ("BASE KJV,active=1 --dry-run", "active '1' must be yes or no"),
        ("BASE KJV,name=a,name=b --dry-run", "name is given twice"),
        ("BASE ,position=1 --dry-run", "no folder or Hub ID before the comma"),
        ("", "NAME"),
    ],
)
def test_what_is_malformed_is_2(names, reason, base, kjv):
    result = invoke("transplant", *names.replace("BASE", base).replace("KJV", kjv).split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr and reason in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("BASE KJV KJV", "several organs are named 't-kjv'"),
        ("BASE KJV,position=9", "position 9 of 4"),
        ("BASE KJV,position=1,mode=replace KJV,position=2,name=b", "inside a span"),
        ("BASE me/t-absent", "me/t-absent"),
        ("me/t-absent KJV", "me/t-absent"),
        ("BASE KJV,revision=nobranch", "nobranch"),
        ("BASE KJV,name=a/b", "must be a plain name"),
        ("BASE KJV,scale=inf", "finite number, got inf"),
        ("BASE KJV,position=1,mode=replace,scale=nan", "finite number, got nan"),
        ("KJV --token hf_wrong", "401"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_what_cannot_be_is_1_and_writes_nothing(names, reason, dry, base, kjv, tmp_path, hub: Hub):
    arguments = names.replace("BASE", base).replace("KJV", kjv).split()
    result = invoke("transplant", *arguments, *dry, "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert reason in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_unless_forced(base, kjv, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = invoke("transplant", base, kjv, "-o", tmp_path)
    assert result.exit_code == 1 and "is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    done("transplant", base, kjv, "-o", tmp_path, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "mine.txt"]


@pytest.mark.slow
def test_it_can_be_pushed_inspected_and_merged(base, kjv, law, token_ids, tmp_path):
    done("transplant", base, kjv, f"{law},name=law", "-o", tmp_path / "out")
    found = invoke("inspect", tmp_path / "out").stdout
    header, *rows = [row for row in cells(found) if len(row) == 8]
    organs = [organ for row in rows if (organ := dict(zip(header, row, strict=True)))["name"]]
    assert [(organ["name"], organ["donor"], organ["position"], organ["subfolder"]) for organ in organs] == [
        ("t-kjv", kjv, "3", ""),
        ("law", "", "0", "law"),
    ]
    (tmp_path / "out" / "README.md").unlink()  # push writes the card anew
    done("push", tmp_path / "out", "me/t-both")
    assert HfApi().list_repo_files("me/t-both") == [
        ".gitattributes",
        "README.md",
        "config.json",
        "law/README.md",
        "law/config.json",
        "law/model.safetensors",
    ]
    assert done("merge", "me/t-both", "-o", tmp_path / "merged")["num_layers"] == 6
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(token_ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained("me/t-both")(token_ids).logits, logits)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"donor": "LAW", "revision": None}, "a folder of this machine; copy it in"),
        ({"donor": "me/t-absent"}, "me/t-absent"),
        ({"subfolder": "nothing"}, "nothing"),
        ({"scale": "2"}, "has scale '2'"),
    ],
)
def test_a_composition_that_nobody_could_load_is_not_pushed(entry, reason, base, kjv, law, tmp_path):
    done("transplant", base, kjv, "-o", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["donors"][0] |= {key: str(law) if value == "LAW" else value for key, value in entry.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("push", tmp_path, "me/t-never")
    assert result.exit_code == 1 and reason in result.stderr
    assert not HfApi().repo_exists("me/t-never")
