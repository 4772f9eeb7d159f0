"""What `compose` plans from names, configs and headers alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi

from local_hub import Hub
from not_hf import (
    IncompatibleDonorError,
    NotHFError,
    OrganSource,
    TransplantedForCausalLM,
    compose,
)
from testing.donors import organ
from testing.hub import commit, entries
from testing.models import logits, tiny_model


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(
        NotHFError, match=f"different commits of me/c-other-base .*{first}.* choose one: base_revision="
    ):
        compose(["me/c-first", "me/c-second"])
    assert compose(["me/c-first", "me/c-second"], base_revision=first).base_revision == first
    assert compose(["me/c-first", "me/c-second"], "me/c-other-base").base_revision == second
    with pytest.raises(NotHFError, match=r"do not name one base .*me/c-other-base.*compose\(donors, base\)"):
        compose([kjv, "me/c-first"])
    live.config.base_model_name_or_path = None
    live.save_pretrained(tmp_path / "nameless")
    with pytest.raises(NotHFError, match="do not name one base"):
        compose([tmp_path / "nameless"])


@pytest.mark.slow
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


def test_a_plan_does_not_show_the_token(kjv, base):
    plan = compose([kjv], base=base, token="hf_test")
    assert "hf_test" not in repr(plan)
