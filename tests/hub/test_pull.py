"""Loading by ID over HTTP: every kind of revision, who may, without a Hub, and the base that an organ remembers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from local_hub import DEFAULT_TOKEN, Fault, Hub
from not_hf import CorruptDonorError, DonorConfig, DonorModel, TransplantedForCausalLM
from testing.commands import invoke
from testing.donors import organ, same, with_organs
from testing.models import tiny_model, tiny_tokenizer
from testing.processes import run_python

pytestmark = pytest.mark.xdist_group("pull")  # what is on the Hub is pushed once

BASE, DONOR = "me/pull-base", "me/pull-organ"
INSIDE = "organs/kjv"  # a folder within a repo
T = TransplantedForCausalLM.from_pretrained


def push_base(seed: int, length: int, **where) -> str:
    """Push a base and its tokenizer, each of which tells by a number which it is."""
    tiny_model("llama", seed=seed).push_to_hub(BASE, **where)
    tokenizer = tiny_tokenizer()
    before, tokenizer.model_max_length = tokenizer.model_max_length, length
    tokenizer.push_to_hub(BASE, **where)
    tokenizer.model_max_length = before
    return HfApi().model_info(BASE, revision=where.get("revision")).sha


@pytest.fixture(scope="module")
def commits(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and an organ that was cut from its first commit; branches of both have the same names.

    Base: seed 1 when the organ was cut, 2 on `main` now, 3 on `v1`. Organ: seed 1 on `main`, 2 on `v1`, 3 on
    `refs/pr/1`, 4 in a folder of `sub`.
    """
    first = push_base(seed=1, length=11)
    organs = {seed: organ(BASE, seed) for seed in (1, 2, 3, 4)}
    push_base(seed=2, length=22)
    push_base(seed=3, length=33, revision="v1")
    organs[1].push_to_hub(DONOR)
    organs[2].push_to_hub(DONOR, revision="v1")
    HfApi().create_tag(DONOR, tag="release", revision="v1")
    organs[3].push_to_hub(DONOR, create_pr=True)
    folder = tmp_path_factory.mktemp("inside")
    organs[4].save_pretrained(folder)
    HfApi().create_branch(DONOR, branch="sub")
    HfApi().upload_folder(repo_id=DONOR, folder_path=folder, path_in_repo=INSIDE, revision="sub")
    return {"base": first, "organ": HfApi().model_info(DONOR, revision="v1").sha}


def expected(base_seed: int, organ_seed: int) -> TransplantedForCausalLM:
    """The transplanted model, made without a Hub."""
    base = tiny_model("llama", seed=base_seed)
    return T(base, organ(tiny_model("llama", seed=1), organ_seed))


def test_a_damaged_donor_costs_no_weights_of_its_recipient(hub, tmp_path):
    """Everything about a donor, its values too, is found out before the recipient's weights are asked for."""
    tiny_model("llama").push_to_hub("me/costly-base")
    donor = organ("me/costly-base", 1)
    donor.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    HfApi().upload_folder(repo_id=HfApi().create_repo("me/damaged-organ").repo_id, folder_path=tmp_path)
    hub.requests.clear()
    with pytest.raises(CorruptDonorError, match="non-finite values"):
        T("me/damaged-organ")
    assert not [
        record.path for record in hub.requests if "costly-base" in record.path and "safetensors" in record.path
    ]


# Revisions: those of the base and those of the organ never mix


REVISIONS = {None: 1, "main": 1, "v1": 2, "release": 2, "commit": 2, "refs/pr/1": 3}


@pytest.mark.parametrize(
    "revision",
    [pytest.param(each, marks=pytest.mark.slow if each in ("main", "release") else ()) for each in REVISIONS],
)
def test_an_organ_is_pulled_by_branch_tag_commit_and_pull_request(commits, revision):
    seed = REVISIONS[revision]
    where = {"revision": commits["organ"] if revision == "commit" else revision}
    alone = organ(tiny_model("llama", seed=1), seed)
    assert same(DonorModel.from_pretrained(DONOR, **where), alone)
    assert same(AutoModel.from_pretrained(DONOR, **where), alone)
    for config in (DonorConfig.from_pretrained(DONOR, **where), AutoConfig.from_pretrained(DONOR, **where)):
        assert (config.base_model_name_or_path, config.base_revision) == (BASE, commits["base"])
    assert same(T(DONOR, **where), expected(1, seed))
    assert same(AutoModelForCausalLM.from_pretrained(DONOR, **where), expected(1, seed))
    assert same(T(BASE, DONOR, donor_revision=where["revision"]), expected(2, seed))
    assert AutoTokenizer.from_pretrained(DONOR, **where).model_max_length == 11
    pipe = pipeline("text-generation", model=DONOR, device="cpu", **where)
    assert same(pipe.model, expected(1, seed)) and pipe.tokenizer.model_max_length == 11


@pytest.mark.slow
def test_an_organ_is_pulled_from_a_folder_within_a_repo(commits):
    where, alone = {"revision": "sub", "subfolder": INSIDE}, organ(tiny_model("llama", seed=1), 4)
    assert same(DonorModel.from_pretrained(DONOR, **where), alone)
    assert same(AutoModel.from_pretrained(DONOR, **where), alone)
    assert DonorConfig.from_pretrained(DONOR, **where).base_revision == commits["base"]
    assert same(T(DONOR, **where), expected(1, 4))
    assert same(AutoModelForCausalLM.from_pretrained(DONOR, **where), expected(1, 4))
    assert same(T(BASE, DONOR, donor_revision="sub", donor_subfolder=INSIDE), expected(2, 4))
    assert AutoTokenizer.from_pretrained(DONOR, **where).model_max_length == 11
    model = T(BASE, DONOR, donor_name="first")
    model.load_donor(DONOR, "second", position=1, revision="sub", subfolder=INSIDE)
    again = expected(2, 1)
    again.load_donor(alone, "second", position=1)
    assert same(model, again)


@pytest.mark.parametrize(
    ("arguments", "options", "base_seed", "organ_seed"),
    [
        ((BASE, DONOR), {"revision": "v1"}, 3, 1),
        ((BASE, DONOR), {"donor_revision": "v1"}, 2, 2),
        ((BASE, DONOR), {"revision": "v1", "donor_revision": "refs/pr/1"}, 3, 3),
        ((BASE, DONOR), {"revision": "main", "donor_revision": "v1"}, 2, 2),
        ((DONOR,), {"donor_revision": "v1"}, 1, 2),
        ((DONOR,), {"revision": "v1"}, 1, 2),
    ],
)
def test_revisions_of_base_and_organ_do_not_mix(commits, arguments, options, base_seed, organ_seed):
    assert same(T(*arguments, **options), expected(base_seed, organ_seed))


@pytest.mark.parametrize("options", [{"revision": "release"}, {"donor_revision": "0" * 40}])
def test_a_revision_that_the_repo_does_not_have_is_refused(commits, options):
    """`release` is a tag of the organ, not of the base."""
    (revision,) = options.values()
    with pytest.raises(OSError, match=f"{revision} is not a valid git identifier"):
        T(BASE, DONOR, **options)


def test_the_commit_of_the_base_is_kept_when_the_organ_is_saved_again(commits, tmp_path):
    T(DONOR, revision="v1").save_pretrained(tmp_path)
    assert DonorConfig.from_pretrained(tmp_path).base_revision == commits["base"]
    T(BASE, DONOR, revision="v1").save_pretrained(tmp_path)
    assert DonorConfig.from_pretrained(tmp_path).base_revision == HfApi().model_info(BASE, revision="v1").sha
    assert same(T(tmp_path), expected(3, 1))
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 33


def test_a_tokenizer_of_the_organs_own_is_pulled_by_revision(folder_base):
    """It comes along with an organ whose base is in a folder."""
    repo_id, tokenizer = "me/pull-own-tokenizer", AutoTokenizer.from_pretrained(folder_base)
    organ(folder_base, 1).push_to_hub(repo_id)
    tokenizer.model_max_length = 55
    tokenizer.push_to_hub(repo_id, revision="v2")
    assert AutoTokenizer.from_pretrained(repo_id).model_max_length == 64
    assert AutoTokenizer.from_pretrained(repo_id, revision="v2").model_max_length == 55
    assert AutoTokenizer.from_pretrained(repo_id, revision="v2", local_files_only=True).model_max_length == 55


# Who may


ENTRIES: dict[str, Callable] = {
    "DonorConfig": DonorConfig.from_pretrained,
    "DonorModel": DonorModel.from_pretrained,
    "TransplantedForCausalLM": T,
    "with a base": lambda repo_id, **options: T(BASE, repo_id, **options),
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoTokenizer": AutoTokenizer.from_pretrained,
    "pipeline": lambda repo_id, **options: pipeline("text-generation", model=repo_id, **options),
}


@pytest.fixture(scope="module")
def closed(hub: Hub, commits: dict[str, str]) -> SimpleNamespace:
    """A gated and a private organ, and organs of a gated and of a private base. `friend` was let in, `guest` not."""
    for name in ("guest", "friend"):
        hub.add_user(name, token=f"hf_{name}")
    repos = SimpleNamespace(gated="me/pull-gated", private="me/pull-private")
    pinned = organ(BASE, 1, revision=commits["base"])
    pinned.push_to_hub(repos.gated)
    hub.gate(repos.gated, users=("friend",))
    pinned.push_to_hub(repos.private, private=True)
    repos.of_gated, repos.of_private = "me/pull-of-gated", "me/pull-of-private"
    for base, derived in (("me/pull-gated-base", repos.of_gated), ("me/pull-private-base", repos.of_private)):
        tiny_model("llama", seed=1).push_to_hub(base, private="private" in base)
        tiny_tokenizer().push_to_hub(base)
        organ(base, 1).push_to_hub(derived)
    hub.gate("me/pull-gated-base", users=("friend",))
    return repos


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@pytest.mark.parametrize("token", [False, "hf_guest"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_closed_repo_is_told_as_transformers_tells_it(closed, entry, token, tmp_path, monkeypatch):
    """The client's own typed error is the cause of the `OSError`."""
    # nothing of it is in the cache, from which huggingface_hub 1 would take it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for repo_id, kind, message in (
        (closed.gated, GatedRepoError, f"trying to access a gated repo.*{closed.gated}"),
        (closed.private, RepositoryNotFoundError, f"{closed.private} is not .* If this is a private repository"),
    ):
        with pytest.raises(OSError) as raised:
            ENTRIES[entry](repo_id, token=token)
        assert any(isinstance(error, kind) for error in causes(raised.value))
        assert re.search(message, one_line(raised.value))


@pytest.mark.parametrize("entry", ["TransplantedForCausalLM", "AutoModelForCausalLM", "AutoTokenizer"])
def test_a_closed_base_is_told_with_the_way_out(closed, entry, tmp_path):
    for repo_id, base, kind in (
        (closed.of_gated, "me/pull-gated-base", GatedRepoError),
        (closed.of_private, "me/pull-private-base", RepositoryNotFoundError),
    ):
        with pytest.raises(OSError) as raised:
            ENTRIES[entry](repo_id, token="hf_guest", cache_dir=tmp_path)
        assert any(isinstance(error, kind) for error in causes(raised.value))
        message = str(raised.value)
        assert "\n" not in message and message.startswith(
            f"{repo_id} names {base} as its base, which cannot be read: "
        )
        assert f"TransplantedForCausalLM.from_pretrained(base, {repo_id!r})" in message


def test_cutting_from_a_closed_base_is_told_as_transformers_tells_it(closed, tmp_path):
    for base, kind in (("me/pull-gated-base", GatedRepoError), ("me/pull-private-base", RepositoryNotFoundError)):
        with pytest.raises(OSError) as raised:
            DonorModel.from_base(base, layers=(1, 3), token="hf_guest", cache_dir=tmp_path)
        assert any(isinstance(error, kind) for error in causes(raised.value))


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_token_opens_what_it_may(closed, entry):
    for repo_id, token in (
        (closed.gated, "hf_friend"),
        (closed.of_gated, "hf_friend"),
        (closed.private, DEFAULT_TOKEN),
        (closed.of_private, DEFAULT_TOKEN),
    ):
        loaded = ENTRIES[entry](repo_id, token=token)
        if entry == "TransplantedForCausalLM":
            assert same(loaded, expected(1, 1))


# Without a Hub


OFFLINE = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from not_hf import DonorConfig, DonorModel, TransplantedForCausalLM, check_compatibility
base, donor, composition = sys.argv[1:]
AutoConfig.from_pretrained(donor), AutoModel.from_pretrained(donor), AutoModelForCausalLM.from_pretrained(donor)
TransplantedForCausalLM.from_pretrained(base, donor).load_donor(donor, "second", position=0)
TransplantedForCausalLM.from_pretrained(composition)
assert check_compatibility(donor, base) == []
assert AutoTokenizer.from_pretrained(donor)("w5").input_ids == [5]
write = pipeline("text-generation", model=donor, device="cpu")
print(write("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"])
"""


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    done = run_python("-c", script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_what_is_cached_loads_without_a_request(hub, commits, api, tmp_path):
    names = ["me/pull-cached-organ", "me/pull-cached-composition"]
    organ(BASE, 2).push_to_hub(names[0])
    with_organs(BASE, 1, 2).push_to_hub(names[1], max_shard_size="8KB")
    online = run(OFFLINE, BASE, *names, HF_HOME=str(tmp_path))
    hub.requests.clear()
    offline = run(OFFLINE, BASE, *names, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout
    assert hub.requests == []


@pytest.mark.slow
def test_local_files_only_asks_nobody(hub, commits, api, cache, tmp_path):
    """Even where whole repos were downloaded, which does not tell the cache what they do not have.

    `AutoModel` is left out: of every repo it asks the Hub for an `adapter_config.json`, whatever it was told.
    """
    donors = ["me/pull-local", "me/pull-local-sharded"]
    organ(BASE, 2).push_to_hub(donors[0])
    organ(BASE, 2).push_to_hub(donors[1], max_shard_size="8KB")
    for each in (*donors, BASE):
        snapshot_download(each, cache_dir=tmp_path / "cache")
    hub.requests.clear()
    local = {"local_files_only": True, "cache_dir": tmp_path / "cache"}
    for donor in donors:
        for load in (AutoConfig, AutoTokenizer, DonorConfig, DonorModel, TransplantedForCausalLM):
            load.from_pretrained(donor, **local)
        T(BASE, donor, **local)
    DonorModel.from_base(BASE, layers=(0, 1), **local)
    assert hub.requests == []


def test_what_is_not_cached_is_told(hub, commits, api, tmp_path):
    local = {"local_files_only": True, "cache_dir": tmp_path}
    with pytest.raises(OSError, match=f"no such folder, {DONOR}, no repo of that name in the cache"):
        T(DONOR, **local)
    hf_hub_download(DONOR, "config.json", cache_dir=tmp_path)
    hub.requests.clear()
    with pytest.raises(OSError, match=f"{DONOR}: model.safetensors is not in the cache.*while online"):
        DonorModel.from_pretrained(DONOR, **local)
    for load in (T, AutoTokenizer.from_pretrained):
        with pytest.raises(OSError, match=f"{DONOR} names {BASE} as its base, .* no repo of that name in the cache"):
            load(DONOR, **local)
    assert hub.requests == []


def test_a_shard_that_is_not_cached_is_told(commits, tmp_path):
    organ(BASE, 2).push_to_hub("me/pull-half", max_shard_size="8KB")
    local = {"local_files_only": True, "cache_dir": tmp_path}
    snapshot_download("me/pull-half", cache_dir=tmp_path, ignore_patterns=["*-00002-*"])
    with pytest.raises(OSError, match=r"model-00002-of-.* is not in the cache"):
        DonorModel.from_pretrained("me/pull-half", **local)


def test_a_hub_that_fails_is_not_taken_for_a_repo_without_weights(hub, commits, api, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault = lambda method, path, headers: Fault(status=500) if "model.safetensors" in path else None
    with pytest.raises(OSError) as raised:
        DonorModel.from_pretrained(DONOR, cache_dir=tmp_path)
    assert "has no model.safetensors" not in str(raised.value) and "500" in " ".join(map(str, causes(raised.value)))


# A base that was a folder


@pytest.fixture
def folder_base(base_folder, tmp_path) -> Path:
    """A base in a folder that can be moved away."""
    return Path(shutil.copytree(base_folder("llama"), tmp_path / "base"))


def gone(folder: Path) -> Path:
    return folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize("entry", ["TransplantedForCausalLM", "AutoModelForCausalLM", "pipeline", "AutoTokenizer"])
def test_a_base_in_a_folder_that_is_not_here_is_told_with_the_way_out(folder_base, entry, tmp_path, token_ids):
    donor, here = organ(folder_base, 1), str(tmp_path / "donor")
    donor.save_pretrained(here)
    expected_logits = T(folder_base, here)(token_ids).logits
    moved = gone(folder_base)
    assert AutoTokenizer.from_pretrained(here)("w5").input_ids == [5]  # came along
    for file in Path(here).glob("*token*"):
        file.unlink()
    with pytest.raises((OSError, ValueError)) as raised:
        ENTRIES[entry](here)
    line = str(raised.value).strip().splitlines()[-1]  # a pipeline shows the traceback of what went wrong inside
    told = f"{here} names {folder_base} as its base, which cannot be read: there is no such folder"
    assert told in line and f"TransplantedForCausalLM.from_pretrained(base, {here!r})" in line
    assert torch.equal(T(moved, here)(token_ids).logits, expected_logits)  # as the message says
    assert same(DonorModel.from_pretrained(here), donor)


def test_the_base_may_be_named_otherwise(folder_base, commits, tmp_path, caplog):
    """Cut from a copy in a folder, shared under the base's ID on the Hub."""
    tiny_model("llama", seed=1).save_pretrained(folder_base, max_shard_size="20KB")
    donor = organ(folder_base, 1)
    donor.config.base_model_name_or_path = BASE
    donor.push_to_hub("me/pull-renamed")
    assert "names no base_model" not in caplog.text
    gone(folder_base)
    card = Path(hf_hub_download("me/pull-renamed", "README.md")).read_text(encoding="utf-8")
    assert f"base_model: {BASE}" in card and f"base_model:adapter:{BASE}" in card and str(folder_base) not in card
    assert "tokenizer_config.json" not in HfApi().list_repo_files("me/pull-renamed")
    assert same(T("me/pull-renamed"), T(tiny_model("llama", seed=2), donor))  # what BASE is now
    assert AutoTokenizer.from_pretrained("me/pull-renamed").model_max_length == 22
    pipe = pipeline("text-generation", model="me/pull-renamed", device="cpu")
    assert isinstance(pipe.model, TransplantedForCausalLM)


def test_a_recipient_may_be_named_otherwise(folder_base, commits, tmp_path):
    """Trained in a copy in a folder, shared as an organ of the model on the Hub."""
    model = T(folder_base, organ(folder_base, 1))
    model.base_config.name_or_path = BASE
    model.save_pretrained(tmp_path / "organ")
    config = DonorConfig.from_pretrained(tmp_path / "organ")
    assert (config.base_model_name_or_path, config.base_revision) == (BASE, None)
    assert f"base_model: {BASE}" in (tmp_path / "organ" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "organ" / "tokenizer_config.json").exists()


@pytest.mark.parametrize("copy", ["folder", "repo"])
def test_the_command_line_names_the_base_otherwise(copy, folder_base, base_repo, commits, tmp_path):
    out, copied = tmp_path / "organ", str(folder_base) if copy == "folder" else base_repo("llama")
    done = invoke("extract", copied, "--layers", "1:3", "--base-name", BASE, "-o", out)
    assert done.exit_code == 0, done.stderr
    config = DonorConfig.from_pretrained(out)
    assert (config.base_model_name_or_path, config.base_revision) == (BASE, None)
    assert same(T(out), T(tiny_model("llama", seed=2), DonorModel.from_base(copied, layers=(1, 3))))


def test_a_base_that_is_named_otherwise_is_not_sought_in_the_subfolder_of_its_copy(folder_base, tmp_path):
    where, out = ["--subfolder", folder_base.name], tmp_path / "organ"
    done = invoke("extract", folder_base.parent, *where, "--layers", "1:3", "--base-name", BASE, "-o", out)
    assert done.exit_code == 0, done.stderr
    config = DonorConfig.from_pretrained(out)
    assert (config.base_model_name_or_path, config.base_subfolder) == (BASE, None)


# Xet, in processes of their own: the client reads its settings once, at import

XET_PUSH = """
import sys
from not_hf import DonorModel, TransplantedForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, local = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(folder)
base.push_to_hub("me/xet-base")
AutoTokenizer.from_pretrained(folder).push_to_hub("me/xet-base")
donor = DonorModel.from_base("me/xet-base", layers=(1, 3), position=2)
donor.push_to_hub("me/xet-organ")
donor.push_to_hub("me/xet-organ", max_shard_size="8KB")
donor.push_to_hub("me/xet-organ", create_pr=True)
model = TransplantedForCausalLM.from_pretrained("me/xet-base", donor, donor_name="first")
model.load_donor(donor, "second", position=0)
model.push_to_hub("me/xet-two", revision="dev")
donor.save_pretrained(local + "/organ")
model.merge_and_unload().save_pretrained(local + "/two")
"""
XET_PULL = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from not_hf import DonorModel, TransplantedForCausalLM
(local,) = sys.argv[1:]
def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
organ = DonorModel.from_pretrained(local + "/organ")
for revision in (None, "refs/pr/1"):
    assert same(DonorModel.from_pretrained("me/xet-organ", revision=revision), organ)
two = AutoModelForCausalLM.from_pretrained("me/xet-two", revision="dev")
assert two.active_donors == ["first", "second"]
assert same(two, AutoModelForCausalLM.from_pretrained(local + "/two"))
assert same(DonorModel.from_base("me/xet-base", layers=(1, 3)), organ)
assert pipeline("text-generation", model="me/xet-organ", device="cpu")("w5", max_new_tokens=2)
"""


@pytest.mark.slow
def test_organs_travel_over_xet(base_folder, tmp_path):
    with Hub(tmp_path / "hub", xet=True) as hub:
        client = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": DEFAULT_TOKEN, "HF_HUB_DISABLE_XET": "0"}
        for script, home, arguments in (
            (XET_PUSH, "home 1", (str(base_folder("llama")), str(tmp_path))),
            (XET_PULL, "home 2", (str(tmp_path),)),
        ):
            run(script, *arguments, HF_HOME=str(tmp_path / home), **client)
            # but for the ranges that a cut asks for: those are plain HTTP
            files = [record for record in hub.requests if "/xorb" in record.path or record.path.startswith("/lfs/")]
            assert any("/xorb" in record.path for record in files)
            assert all("/xorb" in record.path or record.range for record in files)
            hub.requests.clear()
