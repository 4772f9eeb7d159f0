"""Compositions: several organs by reference or in subfolders, planned, written, loaded and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from local_hub import Hub
from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    OrganSource,
    TransplantedForCausalLM,
    compose,
)
from not_hf.architecture.differences import config_differences
from not_hf.composition.layout import Place, arrange
from testing import tree
from testing.commands import done
from testing.donors import organ
from testing.models import logits, tiny_model

PROMPT = "w5 w6 w7 w8"


def commit(repo: str) -> str:
    return HfApi().model_info(repo).sha


def entries(folder: Path) -> list[dict]:
    return json.loads((folder / "config.json").read_text())["donors"]


def weights_asked_for(hub: Hub) -> list[str]:
    """Addresses of weights, and of their storage, since the requests were cleared."""
    return [record.path for record in hub.requests if "safetensors" in record.path or "/lfs/" in record.path]


@pytest.fixture(scope="module")
def base(base_repo) -> str:
    return base_repo("llama")


@pytest.fixture(scope="module")
def kjv(base) -> str:
    """Layers 1 and 2, inserted before layer 3."""
    organ(base, 1).push_to_hub("me/c-kjv")
    return "me/c-kjv"


@pytest.fixture(scope="module")
def law(base) -> str:
    """Layer 0, in its own place."""
    organ(base, 2, (0, 1), mode="replace").push_to_hub("me/c-law")
    return "me/c-law"


@pytest.fixture(scope="module")
def both(base, kjv, law, tmp_path_factory) -> Path:
    """A folder that refers to the two."""
    folder = tmp_path_factory.mktemp("both")
    compose([kjv, OrganSource("law", law, position=1)], base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_by_one(base, kjv, law) -> TransplantedForCausalLM:
    """The same organs, loaded by hand."""
    model = TransplantedForCausalLM.from_pretrained(base, kjv, donor_name="c-kjv")
    model.load_donor(law, "law", position=1)
    return model


@pytest.fixture
def edited(both, tmp_path) -> Callable[..., Path]:
    """A copy of `both` with other entries."""

    def edit(*donors, **root) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(both, folder)
        config = json.loads((folder / "config.json").read_text())
        given = [entry(config["donors"]) if callable(entry) else entry for entry in donors]
        (folder / "config.json").write_text(json.dumps({**config, "donors": given or config["donors"], **root}))
        return folder

    return edit


# ------------------------------------------------------------------------------------- what is written


def test_donors_from_the_hub_are_listed_at_their_commits(base, kjv, law, both):
    assert sorted(path.name for path in both.iterdir()) == ["README.md", "config.json"]
    config = DonorConfig.from_pretrained(both)
    assert (config.base_model_name_or_path, config.base_revision) == (base, commit(base))
    assert config_differences(config.native_config("base_config"), AutoConfig.from_pretrained(base)) == []
    assert config.donors == [
        {
            "name": "c-kjv",
            "donor": kjv,
            "revision": commit(kjv),
            "position": 3,
            "mode": "insert",
            "scale": 1.0,
            "active": True,
        },
        {
            "name": "law",
            "donor": law,
            "revision": commit(law),
            "position": 1,
            "mode": "replace",
            "scale": 1.0,
            "active": True,
        },
    ]
    card = (both / "README.md").read_text()
    link = f"[{law} at {commit(law)}](https://huggingface.co/{law}/tree/{commit(law)})"
    assert f"| law | {link} | 1 | replace | 1.0 |" in card
    assert f"base_model: {base}" in card


def test_local_donors_are_copied_in_and_those_from_the_hub_when_asked(base, kjv, law, one_by_one, token_ids, tmp_path):
    DonorModel.from_pretrained(law).save_pretrained(tmp_path / "my.law", max_shard_size="10KB")
    plan = compose([kjv, OrganSource("", tmp_path / "my.law", position=1)], base)
    plan.save_pretrained(tmp_path / "some")
    plan.save_pretrained(tmp_path / "all", embed=True)
    shutil.rmtree(tmp_path / "my.law")
    assert [entry.get("subfolder") for entry in entries(tmp_path / "some")] == [None, "my-law"]
    assert entries(tmp_path / "some")[0]["revision"] == commit(kjv)
    assert [entry.get("subfolder") for entry in entries(tmp_path / "all")] == ["c-kjv", "my-law"]
    assert not any("donor" in entry for entry in entries(tmp_path / "all"))
    assert (tmp_path / "all" / "c-kjv" / "README.md").exists()
    assert len(list((tmp_path / "some" / "my-law").glob("*.safetensors"))) > 1
    for name in ("some", "all"):
        model = TransplantedForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(model, token_ids), logits(one_by_one, token_ids))


def test_a_plan_tells_the_stack_and_the_sizes_and_reads_no_weights(hub: Hub, base, tmp_path):
    fresh = organ(base, 7, (0, 3))
    fresh.push_to_hub("me/c-unread", max_shard_size="20KB")
    hub.requests.clear()
    plan = compose(["me/c-unread", OrganSource("off", "me/c-unread", position=0, active=False)], base)
    plan.save_pretrained(tmp_path)
    assert plan.stack == [
        (None, 0),
        (None, 1),
        (None, 2),
        ("c-unread", 0),
        ("c-unread", 1),
        ("c-unread", 2),
        (None, 3),
    ]
    assert {organ.num_parameters for organ in plan.organs} == {fresh.num_parameters()}
    assert {organ.size for organ in plan.organs} == {4 * fresh.num_parameters()}  # float32
    weights = [record for record in hub.requests if ".safetensors" in record.path and "index" not in record.path]
    assert weights and all(record.range == "bytes=0-100000" for record in weights if record.bytes)
    assert [entry["active"] for entry in entries(tmp_path)] == [True, False]
    assert "off (inactive)" in (tmp_path / "README.md").read_text()
    assert TransplantedForCausalLM.from_pretrained(tmp_path).active_donors == ["c-unread"]


def test_a_base_on_this_machine_is_named_and_its_tokenizer_copied(base_folder, base, kjv, tmp_path):
    compose([kjv], base_folder("llama")).save_pretrained(tmp_path)
    config = DonorConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.base_revision) == (str(base_folder("llama")), None)
    assert (tmp_path / "tokenizer.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path)(PROMPT).input_ids == [5, 6, 7, 8]


def test_the_base_is_the_one_that_all_donors_name(base, kjv, law, tmp_path):
    plan = compose([kjv, law])
    assert (plan.base, plan.base_revision) == (base, commit(base))

    HfApi().create_repo("me/c-other-base")
    first = tiny_model("llama", seed=5).push_to_hub("me/c-other-base").oid
    organ("me/c-other-base", 3).push_to_hub("me/c-first")
    second = tiny_model("llama", seed=6).push_to_hub("me/c-other-base").oid
    organ("me/c-other-base", 3, position=0).push_to_hub("me/c-second")
    live = organ("me/c-other-base", 3)
    live.config.base_revision = None
    live.save_pretrained(tmp_path / "third")
    assert compose([tmp_path / "third"]).base_revision == second  # as it is now
    assert compose([tmp_path / "third", "me/c-first"]).base_revision == first
    with pytest.raises(NotHFError, match=f"different commits of me/c-other-base .*{first}.* choose one: base_revision="):
        compose(["me/c-first", "me/c-second"])
    assert compose(["me/c-first", "me/c-second"], base_revision=first).base_revision == first
    assert compose(["me/c-first", "me/c-second"], "me/c-other-base").base_revision == second
    with pytest.raises(NotHFError, match=r"do not name one base .*me/c-other-base.*compose\(donors, base\)"):
        compose([kjv, "me/c-first"])
    live.config.base_model_name_or_path = None
    live.save_pretrained(tmp_path / "nameless")
    with pytest.raises(NotHFError, match="do not name one base"):
        compose([tmp_path / "nameless"])


def test_a_composition_among_the_donors_stands_for_its_organs(base, kjv, law, both, token_ids, tmp_path):
    """Its references stay references; what lies in its own repo is referred to there, at its commit."""
    inner = compose([kjv, OrganSource("mine", law, position=2, active=False)], base)
    inner.save_pretrained(tmp_path / "embedded", embed=True)
    HfApi().create_repo("me/c-inner")
    for folder, place in ((tmp_path / "embedded", "sub/embedded"), (both, "sub/referring")):
        HfApi().upload_folder(repo_id="me/c-inner", folder_path=folder, path_in_repo=place)
    pinned = commit("me/c-inner")
    last = OrganSource("last", kjv, position=4)
    referring, embedded = (OrganSource("", "me/c-inner", subfolder=f"sub/{n}") for n in ("referring", "embedded"))
    compose([referring, last], base).save_pretrained(tmp_path / "a")
    assert [(e["name"], e["donor"], e["revision"]) for e in entries(tmp_path / "a")] == [
        ("c-kjv", kjv, commit(kjv)),
        ("law", law, commit(law)),
        ("last", kjv, commit(kjv)),
    ]
    compose([embedded, last]).save_pretrained(tmp_path / "b")
    found = entries(tmp_path / "b")
    assert [(e["name"], e["donor"], e["revision"], e.get("subfolder")) for e in found] == [
        ("c-kjv", "me/c-inner", pinned, "sub/embedded/c-kjv"),
        ("mine", "me/c-inner", pinned, "sub/embedded/mine"),
        ("last", kjv, commit(kjv), None),
    ]
    assert [(e["position"], e["mode"], e["active"]) for e in found] == [
        (3, "insert", True),
        (2, "replace", False),
        (4, "insert", True),
    ]
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "b")
    expected = TransplantedForCausalLM.from_pretrained(base, kjv, donor_name="a")
    expected.load_donor(kjv, "b", position=4)
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))
    compose([tmp_path / "embedded"], base).save_pretrained(tmp_path / "c")  # local: copied again
    assert [(e.get("donor"), e["subfolder"]) for e in entries(tmp_path / "c")] == [(None, "c-kjv"), (None, "mine")]


# ----------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module", params=["folder", "repo"])
def where(request, both) -> str:
    if request.param == "folder":
        return str(both)
    HfApi().create_repo("me/c-both")
    HfApi().upload_folder(repo_id="me/c-both", folder_path=both)
    return "me/c-both"


@pytest.mark.parametrize("load", [TransplantedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_it_loads_as_its_organs_do_one_by_one(load, where, one_by_one, token_ids, tmp_path):
    model = load(where)
    assert isinstance(model, TransplantedForCausalLM) and model.active_donors == ["c-kjv", "law"]
    assert torch.equal(logits(model, token_ids), logits(one_by_one, token_ids))
    for chosen in ("law", "c-kjv"):
        model.set_donor(chosen)
        one_by_one.set_donor(chosen)
        assert torch.equal(logits(model, token_ids), logits(one_by_one, token_ids))
    one_by_one.set_donor(["c-kjv", "law"])
    model.set_donor(["c-kjv", "law"])
    model.save_pretrained(tmp_path)  # a model is saved with its weights, whatever it was loaded from
    assert [entry["subfolder"] for entry in entries(tmp_path)] == ["c-kjv", "law"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), logits(model, token_ids))


def test_into_a_named_base_and_into_a_live_one(where, base, one_by_one, token_ids):
    expected = logits(one_by_one, token_ids)
    assert torch.equal(logits(TransplantedForCausalLM.from_pretrained(base, where), token_ids), expected)
    live = AutoModelForCausalLM.from_pretrained(base)
    model = TransplantedForCausalLM.from_pretrained(live, where)
    assert model is live and torch.equal(logits(model, token_ids), expected)


def test_its_tokenizer_is_the_bases(where):
    assert AutoTokenizer.from_pretrained(where)(PROMPT).input_ids == [5, 6, 7, 8]


def test_a_pipeline_loads_it_and_logs_no_warning(where, one_by_one):
    """In a process of its own, since warnings are logged once per process."""
    script = f"""
        import not_hf
        from transformers import pipeline
        pipe = pipeline("text-generation", model={where!r}, device="cpu")
        out = pipe({PROMPT!r}, max_new_tokens=6, do_sample=False, return_full_text=False)
        print(out[0]["generated_text"])
        assert pipe.model.active_donors == ["c-kjv", "law"]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(where)
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = one_by_one.generate(**ids, max_new_tokens=6, do_sample=False)[0, 4:]
    assert done.stdout.strip() == tokenizer.decode(expected).strip()
    assert [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line] == []


def test_commits_hold_when_branches_move_on(token_ids, tmp_path):
    HfApi().create_repo("me/c-moving-base")
    tiny_model("llama", seed=1).push_to_hub("me/c-moving-base")
    organ("me/c-moving-base", 1).push_to_hub("me/c-moving")
    expected = logits(TransplantedForCausalLM.from_pretrained("me/c-moving"), token_ids)
    compose(["me/c-moving"]).save_pretrained(tmp_path)
    HfApi().create_repo("me/c-still")
    HfApi().upload_folder(repo_id="me/c-still", folder_path=tmp_path)
    tiny_model("llama", seed=2).push_to_hub("me/c-moving-base")
    organ("me/c-moving-base", 2).push_to_hub("me/c-moving")
    assert not torch.equal(logits(TransplantedForCausalLM.from_pretrained("me/c-moving"), token_ids), expected)
    for name in (tmp_path, "me/c-still"):
        for load in (TransplantedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
            assert torch.equal(logits(load(name), token_ids), expected)


def test_revisions_and_subfolders_stay_with_their_repos(base, kjv, law, both, one_by_one, token_ids, tmp_path):
    """A branch and a folder that only the composition's repo has, one that only a donor's has, neither of the base."""
    HfApi().create_repo("me/c-branched")
    HfApi().create_branch("me/c-branched", branch="mine")
    DonorModel.from_pretrained(law).save_pretrained(tmp_path / "law")
    HfApi().create_repo("me/c-deep")
    HfApi().create_branch("me/c-deep", branch="theirs")
    deep = {"repo_id": "me/c-deep", "path_in_repo": "organs/law", "revision": "theirs"}
    HfApi().upload_folder(folder_path=tmp_path / "law", **deep)
    source = OrganSource("law", "me/c-deep", revision="theirs", subfolder="organs/law", position=1)
    compose([kjv, source], base).save_pretrained(tmp_path / "both")
    assert entries(tmp_path / "both")[1]["revision"] == HfApi().model_info("me/c-deep", revision="theirs").sha
    HfApi().upload_folder(
        repo_id="me/c-branched", folder_path=tmp_path / "both", path_in_repo="some/place", revision="mine"
    )
    for load in (TransplantedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        model = load("me/c-branched", revision="mine", subfolder="some/place")
        assert torch.equal(logits(model, token_ids), logits(one_by_one, token_ids))
    tokenizer = AutoTokenizer.from_pretrained("me/c-branched", revision="mine", subfolder="some/place")
    assert tokenizer(PROMPT).input_ids == [5, 6, 7, 8]
    model = TransplantedForCausalLM.from_pretrained(
        base, "me/c-branched", donor_revision="mine", donor_subfolder="some/place", revision=commit(base)
    )
    assert torch.equal(logits(model, token_ids), logits(one_by_one, token_ids))


def test_a_reference_without_a_revision_means_the_default_branch(edited, base, law, token_ids):
    folder = edited({"name": "a", "donor": law, "subfolder": None, "position": None, "scale": 1})
    expected = TransplantedForCausalLM.from_pretrained(base, law)
    model = TransplantedForCausalLM.from_pretrained(folder)
    assert model.donor_config["a"].position == 0 and model.donor_config["a"].mode == "replace"
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))
    compose([folder]).save_pretrained(folder.parent / "again")
    assert entries(folder.parent / "again")[0]["revision"] == commit(law)


@pytest.fixture(scope="module", params=["private", "gated"])
def closed(request, hub: Hub, tmp_path_factory, token_ids) -> tuple[str, Path, list[str], torch.Tensor]:
    """An open composition of a closed organ for a closed base, as a repo and a folder; the two; what it computes."""
    hub.add_user("friend", "hf_friend")
    base, donor, both = (f"me/c-{request.param}-{what}" for what in ("base", "organ", "both"))
    private = request.param == "private"
    tiny_model("llama").push_to_hub(base, private=private)
    organ(base, 1).push_to_hub(donor, private=private)
    folder = tmp_path_factory.mktemp("closed")
    compose([donor]).save_pretrained(folder)
    HfApi().create_repo(both)
    HfApi().upload_folder(repo_id=both, folder_path=folder)
    expected = logits(TransplantedForCausalLM.from_pretrained(both), token_ids)
    if not private:
        hub.gate(base)
        hub.gate(donor)
    return both, folder, [base, donor], expected


@pytest.mark.parametrize("form", [0, 1], ids=["repo", "folder"])
def test_the_token_and_the_cache_reach_every_repo(form, hub: Hub, closed, token_ids, tmp_path):
    name, repos, expected = closed[form], closed[2], closed[3]
    online = {"cache_dir": tmp_path, "token": "hf_test"}
    model = AutoModelForCausalLM.from_pretrained(name, **online)
    assert torch.equal(logits(model, token_ids), expected)
    assert {f"models--{repo.replace('/', '--')}" for repo in repos} <= {path.name for path in tmp_path.iterdir()}
    hub.requests.clear()
    offline = {"cache_dir": tmp_path, "token": False, "local_files_only": True}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(name, **offline), token_ids), expected)
    assert compose([name], **offline).base == repos[0]
    assert not hub.requests


@pytest.mark.parametrize("token", [False, "hf_friend"])
@pytest.mark.parametrize("form", [0, 1], ids=["repo", "folder"])
def test_without_the_right_token_nothing_of_a_closed_repo_is_read(token, form, hub: Hub, closed, tmp_path):
    """With a fresh cache: what is cached needs no token."""
    given = {"cache_dir": tmp_path, "token": token}
    hub.requests.clear()
    for load in (
        AutoModelForCausalLM.from_pretrained,
        TransplantedForCausalLM.from_pretrained,
        lambda name, **given: compose([name], **given),
    ):
        with pytest.raises(OSError, match="|".join(closed[2])):
            load(closed[form], **given)
    assert not weights_asked_for(hub)


# --------------------------------------------------------------------------------------- what is refused


def second(**changes) -> Callable[[list[dict]], dict]:
    return lambda donors: {**donors[1], **changes}


def first(donors: list[dict]) -> dict:
    return donors[0]


BROKEN: dict[str, tuple[Sequence, type, str]] = {
    "two of one name": ((first, second(name="c-kjv")), CorruptDonorError, "several organs are named 'c-kjv'"),
    "unknown key": ((first, second(color="red")), CorruptDonorError, "'law' .* has an unknown key 'color'; known are"),
    "no place": (({"name": "law"},), CorruptDonorError, "needs a name, and a donor or subfolder"),
    "no name": ((second(name=""),), CorruptDonorError, "needs a name, and a donor or subfolder"),
    "a list": (([],), CorruptDonorError, "needs a name, and a donor or subfolder"),
    "name of a wrong type": ((second(name=3),), CorruptDonorError, "has name 3, which must be str"),
    "donor of a wrong type": ((second(donor=["me/a"]),), CorruptDonorError, "has donor .*, which must be str"),
    "position as text": ((second(position="1"),), CorruptDonorError, "has position '1', which must be int"),
    "position as truth": ((second(position=True),), CorruptDonorError, "has position True, which must be int"),
    "active as a number": ((second(active=1),), CorruptDonorError, "has active 1, which must be bool"),
    "scale as text": ((second(scale="1"),), CorruptDonorError, "has scale '1', which must be int or float"),
    "unknown mode": ((second(mode="graft"),), CorruptDonorError, "has mode 'graft', which must be one of"),
    "name with a slash": ((second(name="../law"),), CorruptDonorError, "plain name"),
    "subfolder above": ((second(donor=None, revision=None, subfolder="a/../.."),), CorruptDonorError, "leads out"),
    "absolute subfolder": ((second(subfolder="/etc"),), CorruptDonorError, "leads out"),
    "itself as a subfolder": (
        (second(donor=None, revision=None, subfolder="."),),
        CorruptDonorError,
        "or to the composition itself",
    ),
    "revision of nothing": ((second(donor=None, subfolder="law"),), CorruptDonorError, "a revision but no donor"),
    "another composition": ((first, second(donor="me/c-nest")), CorruptDonorError, "'law' is a composition itself"),
    "a scale that is none": ((second(scale=float("inf")),), CorruptDonorError, "scale inf, which must be a finite"),
    "a scale of a replacement": (
        (first, second(scale=0.5)),
        IncompatibleDonorError,
        "'law': scale 0.5 is for",
    ),
    "negative position": (
        (first, second(position=-1)),
        IncompatibleDonorError,
        "organ 'law': cannot replace 1 layers",
    ),
    "overlap": (
        (first, second(), second(name="again")),
        IncompatibleDonorError,
        r"layers \[1\] are already replaced by organ 'law'; move organ 'again'",
    ),
    "absent repo": ((first, second(donor="me/c-absent")), OSError, "me/c-absent"),
    "absent commit": ((first, second(revision="0" * 40)), OSError, "0000"),
    "absent subfolder": ((first, second(subfolder="nothing")), NotHFError, "me/c-law/nothing is not a donor"),
    "a model": ((first, second(donor="me/tiny-llama", revision=None)), NotHFError, "me/tiny-llama is not a donor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_composition_that_is_not_in_order_is_refused_before_weights_are_read(
    case, edited, both, base, hub: Hub, tmp_path
):
    """With a fresh cache, so that whatever is read is asked for."""
    if case == "another composition" and not HfApi().repo_exists("me/c-nest"):
        HfApi().create_repo("me/c-nest")
        HfApi().upload_folder(repo_id="me/c-nest", folder_path=both)
    donors, error, message = BROKEN[case]
    folder = edited(*donors)
    config = json.loads((folder / "config.json").read_text())
    if case == "another composition":
        config["donors"][1]["revision"] = None
        (folder / "config.json").write_text(json.dumps(config))
    live = AutoModelForCausalLM.from_pretrained(base)
    before = dict(live.named_parameters())
    hub.requests.clear()
    fresh = {"cache_dir": tmp_path / "cache"}
    for load in (
        lambda: TransplantedForCausalLM.from_pretrained(folder, **fresh),
        lambda: AutoModelForCausalLM.from_pretrained(folder, **fresh),
        lambda: TransplantedForCausalLM.from_pretrained(live, folder, **fresh),
        lambda: compose([folder], base, **fresh),
    ):
        with pytest.raises(error, match=message) as raised:
            load()
        assert isinstance(raised.value, ValueError | OSError)
        assert "\n" not in str(raised.value) or not isinstance(raised.value, ValueError)
    assert not weights_asked_for(hub)
    assert not isinstance(live, TransplantedForCausalLM) and dict(live.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize("donors", [[], {}, "me/law", 3])
def test_donors_that_are_no_list_of_organs_are_refused(donors, edited):
    with pytest.raises(CorruptDonorError, match="donors"):
        TransplantedForCausalLM.from_pretrained(edited(donors=donors))


def test_a_composition_that_refers_to_itself_is_refused(edited):
    folder = edited({"name": "me", "donor": "me/c-self"})
    HfApi().create_repo("me/c-self")
    HfApi().upload_folder(repo_id="me/c-self", folder_path=folder)
    for load in (
        TransplantedForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        lambda name: compose([name]),
    ):
        with pytest.raises(CorruptDonorError, match=r"'me' is a composition itself \(me/c-self\)"):
            load("me/c-self")
        with pytest.raises(CorruptDonorError, match="is a composition itself"):
            load(folder)


def test_a_composition_is_not_moved_nor_taken_for_one_organ(both, base):
    for load in (TransplantedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        for place in ({"position": 1}, {"mode": "replace"}):
            with pytest.raises(NotHFError, match="composition, whose organs have places"):
                load(both, **place)
    for source in (OrganSource("", both, position=1), OrganSource("x", both), OrganSource("", both, active=False)):
        with pytest.raises(NotHFError, match="composition, whose organs have"):
            compose([source])
    with pytest.raises(NotHFError, match="composition of several organs"):
        AutoModel.from_pretrained(both)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = TransplantedForCausalLM.from_pretrained(model, DonorModel.from_base(model, (0, 1)), donor_name="c-kjv")
    with pytest.raises(NotHFError, match="'c-kjv' is taken"):
        TransplantedForCausalLM.from_pretrained(model, both)
    assert model.active_donors == ["c-kjv"]


def test_trust_in_code_does_not_reach_the_base(both, edited, tmp_path):
    """A composition whose base is a repo that brings code."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass C: pass\n")
    folder = edited(base_model_name_or_path=str(tmp_path / "base"), base_revision=None)
    for load in (TransplantedForCausalLM, AutoModelForCausalLM, AutoTokenizer):
        with pytest.raises((ValueError, OSError)):
            load.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises((ValueError, OSError)):
        compose([folder])
    assert not (tmp_path / "ran").exists()


def test_every_mismatch_of_every_organ_is_named_and_nothing_written(base, kjv, law, tmp_path):
    tiny_model("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(IncompatibleDonorError) as raised:
        compose([kjv, OrganSource("law", law, position=9)], tmp_path / "wide")
    for part in ("organ 'c-kjv': donor hidden_size", "organ 'law': donor head_dim", "organ 'law': cannot replace 1"):
        assert part in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]


@pytest.mark.parametrize(
    ("donors", "options", "error", "message"),
    [
        ([], {}, NotHFError, "at least one donor"),
        (["KJV", "KJV"], {}, NotHFError, "several organs are named 'c-kjv'"),
        ([("a.b", "KJV")], {}, NotHFError, "must be a plain name, without dots and slashes, got 'a.b'"),
        ([("a", "LAW", 0), ("b", "LAW", 0)], {}, IncompatibleDonorError, "already replaced by organ 'a'"),
        ([("a", "KJV", 1, "replace"), ("b", "LAW", 2, "insert")], {}, IncompatibleDonorError, "inside a span"),
        (["KJV"], {"base": "LAW"}, NotHFError, "is a donor, not a recipient"),
        (["KJV"], {"base": "me/c-nobody"}, OSError, "me/c-nobody"),
        (["KJV"], {"base_revision": "nobranch"}, OSError, "nobranch"),
        (["BASE"], {}, NotHFError, "is not a donor"),
        (["me/c-nothing"], {}, OSError, "me/c-nothing"),
        (["KJV"], {"revision": "main"}, TypeError, "unexpected arguments: revision"),
    ],
)
def test_what_compose_refuses(donors, options, error, message, base, kjv, law):
    names = {"KJV": kjv, "LAW": law, "BASE": base}
    sources = [
        names.get(donor, donor)
        if isinstance(donor, str)
        else OrganSource(donor[0], names[donor[1]], None, None, *donor[2:])
        for donor in donors
    ]
    with pytest.raises(error, match=message):
        compose(sources, **{key: names.get(value, value) for key, value in options.items()})


def test_a_live_donor_and_a_revision_of_a_folder_are_refused_by_compose(base, base_folder, both):
    for refused in (
        lambda: compose([OrganSource("", both, revision="v1")]),
        lambda: compose([both], base_folder("llama"), base_revision="v1"),
    ):
        with pytest.raises(NotHFError, match="is a folder and has no revision 'v1'"):
            refused()
    with pytest.raises(NotHFError, match="compose takes folders and Hub IDs, not a DonorModel; save it first"):
        compose([OrganSource("x", organ(base, 1))], base)


def test_an_overlap_is_none_where_one_is_off(base, law):
    plan = compose([OrganSource("a", law), OrganSource("b", law, active=False)], base)
    assert plan.stack == [("a", 0), (None, 1), (None, 2), (None, 3)]


def test_weights_that_are_missing_or_damaged_are_refused_and_leave_the_folder_as_it_was(base, kjv, law, tmp_path):
    DonorModel.from_pretrained(law).save_pretrained(tmp_path / "law")
    compose([kjv], base).save_pretrained(tmp_path / "out")
    before = tree(tmp_path / "out")
    plan = compose([kjv, tmp_path / "law"], base)
    weights = (tmp_path / "law" / "model.safetensors").read_bytes()
    (tmp_path / "law" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(CorruptDonorError, match="not a whole safetensors file"):
            plan.save_pretrained(folder)
    (tmp_path / "law" / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptDonorError, match="law"):
        compose([tmp_path / "law"], base)
    (tmp_path / "law" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no model.safetensors"):
        compose([tmp_path / "law"], base)
    HfApi().create_repo("me/c-hollow")
    HfApi().upload_folder(repo_id="me/c-hollow", folder_path=tmp_path / "law")
    with pytest.raises(OSError, match=r"has no model.safetensors"):
        compose(["me/c-hollow"], base)
    assert tree(tmp_path / "out") == before and not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(base, kjv, tmp_path, monkeypatch):
    plan = compose([kjv], base)
    plan.save_pretrained(tmp_path / "out")
    before = tree(tmp_path / "out")

    def fill_the_disk(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill_the_disk)
    for folder in ("out", "new"):
        with pytest.raises(OSError, match="No space left"):
            plan.save_pretrained(tmp_path / folder, embed=True)
    assert tree(tmp_path / "out") == before and not (tmp_path / "new").exists()


def test_another_model_or_a_file_in_the_way_is_refused(base, kjv, tmp_path):
    plan = compose([kjv], base)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_model("llama").save_pretrained(tmp_path / "out" / "c-kjv")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "c-kjv").write_text("mine")
    before = tree(tmp_path)
    for folder in ("model", "out"):
        with pytest.raises(NotHFError, match="holds a model of type 'llama'"):
            plan.save_pretrained(tmp_path / folder, embed=True)
    for folder in ("file", "taken"):
        with pytest.raises(NotHFError, match="is a file"):
            plan.save_pretrained(tmp_path / folder, embed=True)
    assert tree(tmp_path) == before


def test_written_over_a_donor_its_weights_go_and_its_card_stays(base, kjv, law, tmp_path):
    DonorModel.from_pretrained(law).save_pretrained(tmp_path)
    DonorModel.from_pretrained(kjv).save_pretrained(tmp_path / "c-kjv", max_shard_size="10KB")
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "\nWritten by hand.\n")
    (tmp_path / "notes.txt").write_text("mine")
    compose([kjv], base).save_pretrained(tmp_path, embed=True)
    assert sorted(tree(tmp_path)) == [
        "README.md",
        "c-kjv/README.md",
        "c-kjv/config.json",
        "c-kjv/model.safetensors",
        "config.json",
        "notes.txt",
    ]
    card = (tmp_path / "README.md").read_text()
    assert "Written by hand." in card and "| c-kjv | c-kjv | 3 | insert | 1.0 |" in card


def test_the_placing_rule_names_both_organs():
    a, b = Place("a", 1, "replace", 2), Place("b", 2, "insert", 1)
    assert arrange(4, [a]) == [(None, 0), ("a", 0), ("a", 1), (None, 3)]
    for places in ([a, b], [b, a]):
        with pytest.raises(IncompatibleDonorError, match="organ 'b' is inside a span that organ 'a' replaces"):
            arrange(4, places)


# What a review found


def test_the_licence_and_the_sizes_are_known_however_it_was_made(base, tmp_path):
    for seed, name in ((1, "one"), (2, "two")):
        donor = organ(base, seed)
        donor.config.license = "mit"
        donor.save_pretrained(tmp_path / name)
    model = TransplantedForCausalLM.from_pretrained(base, tmp_path / "one", donor_name="one", position=0)
    model.load_donor(tmp_path / "two", "two", position=2)
    model.save_pretrained(tmp_path / "saved")
    compose([tmp_path / "one", tmp_path / "two"]).save_pretrained(tmp_path / "composed")
    rows = []
    for name in ("saved", "composed"):
        assert DonorConfig.from_pretrained(tmp_path / name).license == "mit"
        text = (tmp_path / name / "README.md").read_text()
        assert "license: mit" in text
        rows.append([line for line in text.splitlines() if line.startswith(("| Parameters", "| Size"))])
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_an_organ_that_is_gone_is_told_with_who_lists_it(base, hub, tmp_path):
    for seed, repo in ((1, "me/c-stays"), (2, "me/c-goes")):
        organ(base, seed, position=seed).push_to_hub(repo)
    compose(["me/c-stays", "me/c-goes"]).save_pretrained(tmp_path / "both")
    HfApi().delete_repo("me/c-goes")
    with pytest.raises(OSError, match=r"both lists organ 'c-goes' in me/c-goes, which cannot be read") as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path / "both", cache_dir=tmp_path / "cache")
    assert "\n" not in str(raised.value)


def test_a_name_for_all_of_a_composition_is_refused(base, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1), donor_name="one")
    model.load_donor(organ(base, 2), "two", position=0)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match="whose organs have names; leave out the name 'mine'"):
        TransplantedForCausalLM.from_pretrained(base, tmp_path, donor_name="mine")


def test_a_plan_does_not_show_the_token(kjv, base):
    plan = compose([kjv], base=base, token="hf_test")
    assert "hf_test" not in repr(plan)


def test_inspect_adds_up_the_organs(base, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1), donor_name="one")
    model.load_donor(organ(base, 2, (0, 1)), "two", position=0)
    model.save_pretrained(tmp_path)
    found = done("inspect", tmp_path)
    organs = [DonorModel.from_pretrained(tmp_path / name) for name in ("one", "two")]
    assert found["num_parameters"] == sum(each.num_parameters() for each in organs)
    assert {tensor["organ"] for tensor in found["tensors"]} == {"one", "two"}
