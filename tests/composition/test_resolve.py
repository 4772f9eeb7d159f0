"""Compositions are loaded as what they list, from wherever it lies, or refused before weights are read."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from local_hub import Hub
from not_hf import (
    CorruptDonorError,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    OrganSource,
    TransplantedForCausalLM,
    compose,
)
from testing.donors import organ
from testing.hub import commit, entries, weights_asked_for
from testing.models import logits, tiny_model
from testing.processes import run_python
from testing.releases import logged

PROMPT = "w5 w6 w7 w8"


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


@pytest.mark.slow
@pytest.mark.parametrize("where", ["repo"], indirect=True)
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
    done = run_python("-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(where)
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = one_by_one.generate(**ids, max_new_tokens=6, do_sample=False)[0, 4:]
    assert done.stdout.strip() == tokenizer.decode(expected).strip()
    assert logged(done.stderr) == []


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    "a scale beyond floats": ((second(scale=10**400),), CorruptDonorError, "integer of 1329 bits"),
    "name with an escape sequence": ((second(name="\x1b[2Jlaw"),), CorruptDonorError, "plain name"),
    "more organs than anybody needs": (
        [second(name=f"law{n}") for n in range(3000)],
        CorruptDonorError,
        "donors: 3,000 entries; at most 128 are read",
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
