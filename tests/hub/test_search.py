"""Finding donors on the Hub by the tags of their cards, over HTTP, one request per page."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from local_hub import Hub, repos
from not_hf import DonorModel, TransplantedForCausalLM, list_donors
from not_hf.cards.merged import merged_card
from not_hf.hub.search import DonorInfo
from testing.commands import done, failed, invoke
from testing.models import tiny_model

BASE = "finder/base"  # nothing needs to be there
OTHERS = {
    "peft": f"library_name: peft\nbase_model: {BASE}\ntags: [base_model:adapter:{BASE}]",
    "tune": f"library_name: transformers\nbase_model: {BASE}\ntags: [neural-organ-transplantation]",
    "name-not-hf-organ": "license: mit",
}


@pytest.fixture(scope="module")
def shelf(hub: Hub) -> dict[str, str]:
    """Donors of user `finder`, and repos that are none; the commit of each by its ID."""
    hub.add_user("finder", "hf_finder")
    api = HfApi(token="hf_finder")
    commits = {}
    live = tiny_model("llama")
    donor = DonorModel.from_base(live, layers=(1, 3))
    for name, base in (("kjv-organ", BASE), ("law-organ", BASE), ("kjv-secret", BASE), ("far", "finder/other")):
        donor.config.base_model_name_or_path = base
        commit = donor.push_to_hub(f"finder/{name}", token="hf_finder", private="secret" in name)
        commits[f"finder/{name}"] = commit.oid
    live.config.name_or_path = BASE
    card = merged_card(TransplantedForCausalLM.from_pretrained(live, donor), "merged")
    for name, text in {
        **{name: f"---\n{metadata}\n---\n" for name, metadata in OTHERS.items()},
        "merged": str(card),
    }.items():
        repo = api.create_repo(f"finder/{name}").repo_id
        api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=text.encode())
    for n, repo in enumerate(commits):
        hub.rate(repo, downloads=100 * n, likes=n)
    hub.gate("finder/law-organ")
    return commits


def ids(**wanted) -> list[str]:
    return [donor.id for donor in list_donors(**wanted)]


@pytest.mark.slow
def test_only_donors_of_that_base_come_back(shelf):
    assert ids(base_model=BASE) == ["finder/law-organ", "finder/kjv-organ"]  # the most downloaded first
    assert ids(base_model="finder/other") == ["finder/far"]
    assert ids(author="finder") == ["finder/far", "finder/law-organ", "finder/kjv-organ"]
    assert ids(author="finder", token="hf_finder")[1] == "finder/kjv-secret"
    assert set(ids()) >= {"finder/far", "finder/law-organ", "finder/kjv-organ"}
    assert not {f"finder/{name}" for name in (*OTHERS, "merged")} & set(ids(token="hf_finder"))


def test_words(shelf):
    assert ids(search="KJV", base_model=BASE) == ["finder/kjv-organ"]
    assert ids(search="organ law", author="finder") == ["finder/law-organ"]


@pytest.mark.parametrize(
    "wanted", [{"base_model": "no/such"}, {"base_model": "gpt2"}, {"author": "nobody"}, {"search": "no such words"}]
)
def test_what_the_hub_does_not_have_is_no_error(shelf, wanted):
    assert list_donors(**wanted) == []


def test_an_item_says_what_the_hub_says(shelf):
    gated, donor = list_donors(BASE)
    assert isinstance(donor, DonorInfo)
    assert (donor.base_model, donor.downloads, donor.likes) == (BASE, 0, 0)
    assert (gated.downloads, gated.likes) == (100, 1)
    assert (donor.private, donor.gated, gated.gated) == (False, False, "auto")
    assert donor.sha == shelf["finder/kjv-organ"]
    assert abs((datetime.now(UTC) - donor.last_modified).total_seconds()) < 600
    assert {"not_hf", "not-hf", "arxiv:2601.13580", "text-generation"} < set(donor.tags)
    (secret,) = list_donors(search="kjv-secret", token="hf_finder")
    assert secret.private
    with pytest.raises(dataclasses.FrozenInstanceError):
        donor.likes = 5
    assert len({donor, gated}) == 2


@pytest.mark.slow
def test_pages_and_limit(hub, shelf, monkeypatch):
    monkeypatch.setattr(repos, "_PAGE_SIZE", 2)
    hub.requests.clear()
    assert len(ids(author="finder")) == 3
    assert [record.path for record in hub.requests] == ["/api/models"] * 2
    hub.requests.clear()
    assert ids(author="finder", limit=2) == ["finder/far", "finder/law-organ"]
    assert len(hub.requests) == 1  # and none for an item of its own
    assert len(ids(author="finder", limit=9)) == 3


def test_failures_are_os_errors(hub, shelf, monkeypatch):
    with pytest.raises(HfHubHTTPError, match="401") as refused:
        list_donors(token="hf_wrong")
    assert isinstance(refused.value, OSError)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="cannot be reached"):
        list_donors()


@pytest.mark.slow
def test_the_command(shelf):
    found = done("search", "organ", "--author", "finder")["donors"]
    assert [donor["id"] for donor in found] == ["finder/law-organ", "finder/kjv-organ"]
    assert found[1]["base_model"] == BASE and found[1]["sha"] == shelf["finder/kjv-organ"]
    assert datetime.fromisoformat(found[0]["last_modified"]).tzinfo is not None
    assert json.dumps(found)
    table = invoke("search", "--base-model", BASE, "--token", "hf_finder").stdout
    for word in ("finder/kjv-secret", "private", "gated", "open", BASE, "200"):
        assert word in table
    assert len(done("search", "--author", "finder", "--limit", "1")["donors"]) == 1
    assert done("search", "organ", "law", "--author", "finder")["donors"][0]["id"] == "finder/law-organ"
    nothing = invoke("search", "no", "such", "words")
    assert (nothing.exit_code, nothing.stdout) == (0, "no donor found\n")
    assert "401" in failed("search", "--token", "hf_wrong")
