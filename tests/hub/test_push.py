"""Pushing over HTTP: one commit or nothing, on top of what is there, and never an old organ behind a new name."""

from __future__ import annotations

import itertools
import socket
import threading
import traceback
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from local_hub import Fault
from not_hf import DonorConfig, DonorModel, NotHFError, TransplantedForCausalLM, list_donors, push_donor
from not_hf.hub.atomic_write import DRAFT
from testing.commands import failed, invoke
from testing.donors import holds, organ, same, with_organs
from testing.models import tiny_model
from testing.processes import forked

T = TransplantedForCausalLM.from_pretrained


SHARDED = {"max_shard_size": "8KB"}


SINGLE: dict = {}


numbers = itertools.count()


@pytest.fixture
def repo_id() -> str:
    """The name of a repo of the test's own, which is not there yet."""
    return f"me/sharing-{next(numbers)}"


@pytest.fixture(scope="module")
def base(base_repo: Callable[[str], str]) -> str:
    return base_repo("llama")


def state(repo_id: str) -> dict[str, tuple]:
    """Everything about a repo: for each branch, tag and pull request its history and the content of its files."""
    api = HfApi()
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    found = {}
    for ref in (*refs.branches, *refs.tags, *refs.pull_requests):
        files = api.list_repo_tree(repo_id, revision=ref.target_commit, recursive=True)
        history = api.list_repo_commits(repo_id, revision=ref.target_commit)
        found[ref.ref] = ([commit.commit_id for commit in history], [vars(file) for file in files])
    return found


def titles(repo_id: str, revision: str | None = None) -> list[str]:
    return [commit.title for commit in HfApi().list_repo_commits(repo_id, revision=revision)]


def card(repo_id: str, revision: str | None = None) -> ModelCard:
    return ModelCard.load(HfApi().hf_hub_download(repo_id, "README.md", revision=revision))


def write(repo_id: str, path: str, content: str | bytes, **where) -> CommitInfo:
    data = content.encode() if isinstance(content, str) else content
    return HfApi().upload_file(repo_id=repo_id, path_in_repo=path, path_or_fileobj=data, **where)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1,), (1, 2)], ids=["organ", "composition"])
def test_a_push_is_one_commit_with_what_was_asked_for(base, seeds, api, repo_id):
    model = with_organs(base, *seeds)
    info = model.push_to_hub(
        repo_id, commit_message="The title", commit_description="Why.", private=True, tags=["law", "kjv"]
    )
    assert titles(repo_id) == ["The title", "initial commit"]
    assert api.list_repo_commits(repo_id)[0].message == "Why."
    assert api.list_repo_commits(repo_id)[0].commit_id == info.oid
    assert api.model_info(repo_id).private is True
    assert {"not-hf", "law", "kjv"} < set(card(repo_id).data.tags)
    assert holds(repo_id, model)
    assert model.push_to_hub(repo_id).oid == info.oid  # nothing to say
    assert titles(repo_id) == ["The title", "initial commit"]


def test_cards_far_below_the_root_are_left_alone(base, api, repo_id):
    api.create_repo(repo_id)
    write(repo_id, "notes/older/README.md", "By hand.")
    model = with_organs(base, 1)
    model.push_to_hub(repo_id)
    assert holds(repo_id, model) and "notes/older/README.md" in api.list_repo_files(repo_id)


def test_tags_come_from_the_model_as_well(base, api, repo_id):
    donor = organ(base, 1)
    donor.add_model_tags("from-the-model")
    donor.push_to_hub(repo_id, tags="a-string")
    assert card(repo_id).data.tags[-2:] == ["from-the-model", "a-string"]
    donor.push_to_hub(repo_id)
    assert card(repo_id).data.tags.count("from-the-model") == 1 == card(repo_id).data.tags.count("a-string")


@pytest.mark.slow
def test_save_pretrained_pushes_too(base, api, tmp_path):
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path / "named-like-its-folder", push_to_hub=True, commit_message="saved", private=True)
    assert titles("me/named-like-its-folder")[0] == "saved"
    assert api.model_info("me/named-like-its-folder").private is True
    donor.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="me/save-pretrained-1")
    assert holds("me/save-pretrained-1", donor)
    elsewhere = {"push_to_hub": True, "repo_id": "me/save-pretrained-2", **SHARDED}
    with_organs(base, 1).save_pretrained(tmp_path / "other", **elsewhere)
    assert holds("me/save-pretrained-2", donor)
    assert "model.safetensors.index.json" in api.list_repo_files("me/save-pretrained-2")


def test_what_is_pushed_beside_a_save_is_what_was_saved(base, api, repo_id, tmp_path):
    donor = organ(base, 1)
    halved = {name: tensor / 2 for name, tensor in donor.state_dict().items()}
    options = {"push_to_hub": True, "repo_id": repo_id}
    donor.save_pretrained(tmp_path / "donor", state_dict=halved, variant="half", **options)
    assert "model.safetensors" not in api.list_repo_files(repo_id)
    assert same(DonorModel.from_pretrained(repo_id, variant="half", verify=True), halved)
    model = T(base, donor)
    gathered = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model", state_dict=gathered, **options)
    assert same(DonorModel.from_pretrained(repo_id), halved)


@pytest.mark.parametrize("seeds", [None, (1,)], ids=["donor", "organ"])
def test_only_the_main_process_pushes_beside_a_save(base, seeds, api, repo_id, tmp_path):
    model = organ(base, 1) if seeds is None else with_organs(base, *seeds)
    model.save_pretrained(tmp_path / "donor", push_to_hub=True, repo_id=repo_id, is_main_process=False)
    assert not api.repo_exists(repo_id)
    model.save_pretrained(tmp_path / "donor", push_to_hub=True, repo_id=repo_id, is_main_process=True)
    assert holds(repo_id, model)


@pytest.mark.parametrize("seeds", [None, (1,), (1, 2)], ids=["donor", "organ", "composition"])
def test_a_tokenizer_that_the_repo_has_stays(base_folder, seeds, api, repo_id):
    folder = base_folder("llama")
    model = organ(folder, 1) if seeds is None else with_organs(folder, *seeds)
    model.push_to_hub(repo_id)
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    tokenizer.add_tokens(["<verse>"])
    tokenizer.push_to_hub(repo_id)
    model.push_to_hub(repo_id)
    assert "<verse>" in AutoTokenizer.from_pretrained(repo_id).get_vocab()


@pytest.mark.parametrize("pushed", ["donor", "folder"])
def test_a_tokenizer_that_may_be_of_the_base_of_before_stays_with_a_warning(
    pushed, base, base_folder, repo_id, tmp_path, caplog
):
    organ(base_folder("llama"), 1).save_pretrained(tmp_path / "local")
    for _ in range(2):
        push_donor(tmp_path / "local", repo_id)
    assert "tokenizer" not in caplog.text
    donor = organ(base, 2)  # whose tokenizer is on the Hub
    donor.save_pretrained(tmp_path / "donor")
    donor.push_to_hub(repo_id) if pushed == "donor" else push_donor(tmp_path / "donor", repo_id)
    assert f"was of another base, {base_folder('llama')}; if it is the tokenizer of that base" in caplog.text


@pytest.mark.slow
def test_trainer_pushes_the_organ_and_its_tags(base, api, repo_id, tmp_path):
    donor = organ(base, 1)
    model = T(base, donor, is_trainable=True)
    assert T(tiny_model("llama"), donor).unload().model_tags is None
    tokens = torch.randint(3, 90, (4, 8))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, hub_model_id=repo_id, use_cpu=True, report_to=[])
    run = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    run.train()
    run.push_to_hub(commit_message="trained")
    assert titles(repo_id) == ["trained", "initial commit"]
    assert holds(repo_id, model) and not holds(repo_id, T(base, donor))
    assert {"not-hf", f"base_model:adapter:{base}", "generated_from_trainer"} <= set(card(repo_id).data.tags)
    model.push_to_hub(repo_id)
    assert card(repo_id).data.library_name == "not_hf" and holds(repo_id, model)


def test_a_new_branch_starts_from_main_and_leaves_it_alone(base, api, repo_id):
    first, second = organ(base, 1), organ(base, 2)
    first.push_to_hub(repo_id)
    write(repo_id, "README.md", f"{card(repo_id)}\nWritten by hand.\n")
    main = state(repo_id)["refs/heads/main"]
    second.push_to_hub(repo_id, revision="v2", commit_message="second")
    assert state(repo_id)["refs/heads/main"] == main
    assert titles(repo_id, "v2")[0] == "second" and len(titles(repo_id, "v2")) == len(main[0]) + 1
    assert holds(repo_id, first) and holds(repo_id, second, revision="v2")
    assert "Written by hand." in card(repo_id, "v2").text
    first.push_to_hub(repo_id, revision="v2")  # and now it is there
    assert holds(repo_id, first, revision="v2")


@pytest.mark.parametrize("revision", ["main", "dev"])
def test_a_new_repo_with_a_branch(base, api, repo_id, revision):
    organ(base, 1).push_to_hub(repo_id, revision=revision)
    assert holds(repo_id, organ(base, 1), revision=revision)
    assert titles(repo_id)[-1] == "initial commit"


@pytest.mark.parametrize("revision", ["refs/pr/7", "a-tag"])
def test_what_is_no_branch_is_refused(base, api, repo_id, revision):
    organ(base, 1).push_to_hub(repo_id)
    api.create_tag(repo_id, tag="a-tag")
    before = state(repo_id)
    with pytest.raises(OSError, match=revision):
        organ(base, 2).push_to_hub(repo_id, revision=revision)
    assert state(repo_id) == before


@pytest.mark.slow
def test_a_pull_request_by_somebody_else(hub, base, api, repo_id):
    hub.add_user("guest", token="hf_guest")
    first, second, third = (organ(base, seed) for seed in (1, 2, 3))
    first.push_to_hub(repo_id)
    before = state(repo_id)
    with pytest.raises(OSError, match="403"):
        second.push_to_hub(repo_id, token="hf_guest")
    assert state(repo_id) == before
    info = second.push_to_hub(repo_id, create_pr=True, token="hf_guest")
    assert info.pr_revision == "refs/pr/1"
    after = state(repo_id)
    assert {ref: after[ref] for ref in before} == before
    assert holds(repo_id, first) and holds(repo_id, second, revision="refs/pr/1")
    third.push_to_hub(repo_id, revision="refs/pr/1", token="hf_guest")
    assert holds(repo_id, first) and holds(repo_id, third, revision="refs/pr/1")


def test_a_name_without_an_owner_is_in_the_namespace_of_the_token(hub, base, api, monkeypatch):
    hub.add_user("guest", token="hf_guest")
    donor = organ(base, 1)
    assert donor.push_to_hub("short-name").repo_url.repo_id == "me/short-name"
    assert donor.push_to_hub("short-name", token="hf_guest").repo_url.repo_id == "guest/short-name"
    assert holds("guest/short-name", donor)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(LocalTokenNotFoundError, match="login"):
        donor.push_to_hub("short-name")


@pytest.mark.parametrize("seeds", [(1,), (1, 2)], ids=["organ", "composition"])
def test_another_model_is_never_overwritten(base, seeds, api, repo_id, tmp_path):
    tiny_model("llama", seed=5).push_to_hub(repo_id)
    before, model = state(repo_id), with_organs(base, *seeds)
    with pytest.raises(NotHFError, match=rf"{repo_id} holds a model of type 'llama'.*choose another"):
        model.push_to_hub(repo_id)
    assert state(repo_id) == before
    tiny_model("llama", seed=5).save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match="holds a model of type 'llama'"):
        model.save_pretrained(tmp_path)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), tiny_model("llama", seed=5))


fresh = itertools.count(1000)  # seeds of organs that no test has pushed, since the Hub keeps what it was once sent


STAGES = {
    "looking": ("GET", "/api/models/"),
    "card": ("HEAD", "/README.md"),
    "preupload": ("POST", "/preupload/"),
    "lfs batch": ("POST", "/info/lfs/objects/batch"),
    "lfs put": ("PUT", "/lfs/"),
    "commit": ("POST", "/commit/"),
}


def failing(stage: str) -> Callable:
    """A hook by which every request of that stage fails."""
    method, part = STAGES[stage]
    return lambda asked, path, headers: Fault(status=500) if asked == method and part in path else None


@pytest.mark.parametrize("revision", [None, pytest.param("new-branch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_an_upload_that_fails_midway_changes_nothing_and_can_be_repeated(
    hub, base, stage, revision, api, repo_id, no_waiting
):
    organ(base, 1).push_to_hub(repo_id)
    before, second = state(repo_id), with_organs(base, next(fresh), next(fresh))
    hub.fault = failing(stage)
    with pytest.raises((OSError, RuntimeError)):  # the client's own
        second.push_to_hub(repo_id, revision=revision)
    hub.fault = None
    assert state(repo_id) == before
    second.push_to_hub(repo_id, revision=revision)
    assert holds(repo_id, second, revision=revision)
    assert len(titles(repo_id, revision)) == 3


@pytest.mark.parametrize("stage", ["preupload", "lfs batch", "lfs put", "commit"])
def test_a_first_push_that_fails_can_be_repeated(hub, base, stage, api, repo_id, no_waiting):
    donor = organ(base, next(fresh))
    hub.fault = failing(stage)
    with pytest.raises((OSError, RuntimeError)):  # the client's own
        donor.push_to_hub(repo_id)
    hub.fault = None
    assert titles(repo_id) == ["initial commit"]
    donor.push_to_hub(repo_id)
    assert holds(repo_id, donor) and titles(repo_id) == ["Upload organ", "initial commit"]


@pytest.mark.parametrize("revision", [None, "new-branch"])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, base, revision, api, repo_id):
    organ(base, 1).push_to_hub(repo_id)
    second = organ(base, next(fresh))
    hub.fault = lambda method, path, headers: Fault(truncate=True) if "/commit/" in path else None
    with pytest.raises(ConnectionError, match="cannot be pushed, the Hub cannot be reached"):
        second.push_to_hub(repo_id, revision=revision)
    hub.fault = None
    second.push_to_hub(repo_id, revision=revision)
    assert holds(repo_id, second, revision=revision) and len(titles(repo_id, revision)) == 3


def test_a_card_that_cannot_be_read_is_not_overwritten(hub, base, api, repo_id, no_waiting):
    organ(base, 1).push_to_hub(repo_id)
    write(repo_id, "README.md", f"{card(repo_id)}\nWritten by hand.\n")
    hub.fault = failing("card")
    with pytest.raises(OSError):
        organ(base, 2).push_to_hub(repo_id)
    hub.fault = None
    assert "Written by hand." in card(repo_id).text


def push(folder: Path, repo_id: str, revision: str) -> None:
    DonorModel.from_pretrained(folder).push_to_hub(repo_id, revision=revision or None)


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["", "new-branch"])
@pytest.mark.parametrize("stage", ["lfs put", "commit"])
def test_a_process_killed_while_it_uploads_changes_nothing(hub, base, stage, revision, api, repo_id, tmp_path):
    """Up to the commit: when that breaks off, a new branch is there, and is as `main`."""
    organ(base, 1).push_to_hub(repo_id)
    second = organ(base, next(fresh))
    second.save_pretrained(tmp_path)
    before = state(repo_id)
    reached, killed = threading.Event(), threading.Event()
    method, part = STAGES[stage]

    def hold(asked: str, path: str, headers: object) -> Fault | None:
        if asked != method or part not in path:
            return None
        reached.set()
        killed.wait(60)
        return Fault(status=500)

    hub.fault = hold
    process = forked(push, tmp_path, repo_id, revision)
    assert reached.wait(60)
    process.kill()
    process.join()
    killed.set()
    hub.fault = None
    after = state(repo_id)
    if stage == "commit" and revision:
        assert after.pop(f"refs/heads/{revision}") == before["refs/heads/main"]
    assert after == before
    second.push_to_hub(repo_id, revision=revision or None)
    assert holds(repo_id, second, revision=revision or None)


ONE, TWO = (1,), (2, 3)


CHANGES = {
    "shards over a single file": (ONE, SINGLE, (2,), SHARDED),
    "a single file over shards": (ONE, SHARDED, (2,), SINGLE),
    "fewer shards": (ONE, SHARDED, (2,), {"max_shard_size": "20KB"}),
    "a composition over an organ": (ONE, SINGLE, TWO, SINGLE),
    "a composition over an organ in shards": (ONE, SHARDED, TWO, SHARDED),
    "an organ over a composition": (TWO, SINGLE, ONE, SINGLE),
    "a composition in shards over a composition": (TWO, SINGLE, TWO, SHARDED),
    "a composition over a composition in shards": (TWO, SHARDED, TWO, SINGLE),
}
REPEATED = (  # of the others
    *("fewer shards", "a composition over an organ"),
    *("a composition in shards over a composition", "a composition over a composition in shards"),
)


# of the user, and of none of our business; some look like weights
OTHERS = {
    "notes.txt": b"notes",
    "donor_layers.pt": b"pickle",
    "model.fp16.safetensors": b"another variant",
    "old-model.safetensors": b"no name of ours",
    "extra/model.safetensors": b"another folder",
    "extra/deep/model-00001-of-00002.safetensors": b"deeper",
    "extra/config.json": b"{}",
}


@pytest.mark.parametrize("where", ["repo", pytest.param("folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change", [pytest.param(each, marks=pytest.mark.slow if each in REPEATED else ()) for each in CHANGES]
)
def test_weights_of_an_earlier_save_do_not_stay_behind(base, change, where, api, repo_id, tmp_path):
    before, first_options, after, options = CHANGES[change]
    old, new = with_organs(base, *before), with_organs(base, *after)
    if where == "repo":
        target, place = repo_id, repo_id
        old.push_to_hub(target, **first_options)
        for path, content in OTHERS.items():
            write(target, path, content)
        new.push_to_hub(target, **options)
        files = {path for path in api.list_repo_files(target) if path != ".gitattributes"}
        assert titles(target)[0] == "Upload organ" != titles(target)[1]
    else:
        place = tmp_path / "donor"
        old.save_pretrained(place, **first_options)
        for path, content in OTHERS.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)
        new.save_pretrained(place, **options)
        files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    new.save_pretrained(tmp_path / "alone", **options)
    alone = {path.relative_to(tmp_path / "alone").as_posix() for path in (tmp_path / "alone").rglob("*.*")}
    left = {f"organ{seed}/" for seed in before} if len(before) > 1 and len(after) == 1 else set()
    assert {path for path in files if not path.startswith(tuple(left))} == alone | set(OTHERS)
    assert {path.split("/")[0] + "/" for path in files - alone - set(OTHERS)} == left
    assert holds(place, new)
    if where == "folder":
        assert all((place / path).read_bytes() == content for path, content in OTHERS.items())
        assert not [path for path in place.iterdir() if "draft" in path.name]


@pytest.mark.slow
def test_the_command_line_pushes_over_what_is_there(base, api, repo_id, tmp_path):
    """What a killed process left in the folder stays here."""
    organ(base, 1).push_to_hub(repo_id)
    organ(base, 2).save_pretrained(tmp_path, **SHARDED)
    (tmp_path / f"{DRAFT}x").mkdir()
    (tmp_path / f"{DRAFT}x" / "model.safetensors").write_bytes(b"half")
    done = invoke("push", tmp_path, repo_id)
    assert done.exit_code == 0, done.stderr
    assert holds(repo_id, organ(base, 2))
    files = api.list_repo_files(repo_id)
    assert "model.safetensors" not in files and not [path for path in files if "/" in path]
    tiny_model("llama").push_to_hub(other := f"{repo_id}-native")
    done = invoke("push", tmp_path, other)
    assert done.exit_code == 1 and f"{other} holds a model of type 'llama'" in done.stderr


def test_checkpoints_of_a_trainer_are_not_pushed(base, repo_id, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"large")
    result = invoke("push", tmp_path, repo_id)
    assert result.exit_code == 0, result.stderr
    assert not [file for file in HfApi().list_repo_files(repo_id) if "checkpoint" in file]


@pytest.mark.slow
def test_the_generation_config_of_an_earlier_push_goes_with_a_folder_that_has_none(base, api, repo_id, tmp_path):
    model = with_organs(base, 1)
    model.generation_config.max_new_tokens = 7
    model.push_to_hub(repo_id)
    assert T(repo_id).generation_config.max_new_tokens == 7
    organ(base, 2).save_pretrained(tmp_path)
    push_donor(tmp_path, repo_id)
    assert "generation_config.json" not in api.list_repo_files(repo_id) and titles(repo_id)[1] == "Upload organ"
    assert T(repo_id).generation_config.max_new_tokens != 7


def test_results_of_benchmarks_are_pushed(base, repo_id, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    for folder in (".eval_results", ".cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gpqa.yaml").write_text("- dataset: {id: me/gpqa, task_id: all}\n  value: 0.4\n")
    push_donor(tmp_path, repo_id)
    organ(base, 2).push_to_hub(repo_id)
    files = HfApi().list_repo_files(repo_id)
    assert [file for file in files if "gpqa" in file] == [".eval_results/gpqa.yaml"]


def test_a_hub_that_cannot_be_reached_is_an_os_error(base, no_waiting, monkeypatch):
    donor = organ(base, 1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=nobody))
        with pytest.raises(OSError, match="me/unreachable cannot be pushed, the Hub cannot be reached"):
            donor.push_to_hub("me/unreachable")
        with pytest.raises(OSError, match="donors cannot be listed, the Hub cannot be reached"):
            list_donors()


def meanwhile(repo_id: str, times: int) -> Callable:
    """A hook: just before our commit arrives, somebody writes into the card."""
    edits = [f"\nEdit {n}.\n" for n in range(times)]

    def hook(method: str, path: str, headers: dict) -> None:
        if method == "POST" and "/commit/" in path and edits:
            edit = edits.pop(0)
            write(repo_id, "README.md", f"{card(repo_id)}{edit}", commit_message=f"hand:{edit.strip()}")

    return guarded(hook)


def guarded(hook: Callable) -> Callable:
    """Not for the requests that the hook makes itself."""
    inside = threading.Lock()

    def outer(method: str, path: str, headers: dict) -> None:
        if inside.acquire(blocking=False):
            try:
                return hook(method, path, headers)
            finally:
                inside.release()

    return outer


def test_an_edit_during_the_push_is_not_lost(hub, base, api, repo_id):
    second = organ(base, next(fresh))
    organ(base, 1).push_to_hub(repo_id)
    hub.requests.clear()
    hub.fault = meanwhile(repo_id, times=2)
    second.push_to_hub(repo_id, commit_message="second")
    assert titles(repo_id) == ["second", "hand:Edit 1.", "hand:Edit 0.", "Upload organ", "initial commit"]
    assert "Edit 0." in card(repo_id).text and "Edit 1." in card(repo_id).text
    assert holds(repo_id, second)
    assert len([record for record in hub.requests if record.method == "PUT"]) == 1  # the weights are sent once


@pytest.mark.parametrize("revision", [None, pytest.param("v2", marks=pytest.mark.slow)])
def test_a_repo_or_branch_that_somebody_else_creates_during_the_push_is_pushed_to(hub, revision, base, api, repo_id):
    second, theirs = (organ(base, next(fresh)) for _ in range(2))
    if revision is not None:
        organ(base, 1).push_to_hub(repo_id)
    part = "/api/repos/create" if revision is None else "/branch/"
    pushes = [theirs]

    def hook(method: str, path: str, headers: dict) -> None:
        if method == "POST" and part in path and pushes:
            pushes.pop().push_to_hub(repo_id, revision=revision, commit_message="theirs")

    hub.fault = guarded(hook)
    second.push_to_hub(repo_id, revision=revision, commit_message="ours")
    assert titles(repo_id, revision)[:2] == ["ours", "theirs"] and holds(repo_id, second, revision=revision)


@pytest.mark.slow
def test_a_repo_that_never_rests_is_an_error(hub, base, api, repo_id):
    organ(base, 1).push_to_hub(repo_id)
    hub.fault = meanwhile(repo_id, times=100)
    with pytest.raises(HfHubHTTPError, match="commit has happened since"):
        organ(base, 2).push_to_hub(repo_id)
    hub.fault = None
    assert holds(repo_id, organ(base, 1)) and "Edit 4." in card(repo_id).text


@pytest.mark.slow
def test_two_pushes_at_once_leave_one_whole_organ(base, api, repo_id):
    """In whichever order they come, config and weights are of one of them."""
    organ(base, 1).push_to_hub(repo_id)
    pushes = [
        threading.Thread(target=organ(base, 2, position=0).push_to_hub, args=(repo_id,)),
        threading.Thread(target=organ(base, 3, position=1).push_to_hub, args=(repo_id,), kwargs=SHARDED),
    ]
    for push in pushes:
        push.start()
    for push in pushes:
        push.join()
    assert len(titles(repo_id)) == 4
    seed = {0: 2, 1: 3}[DonorConfig.from_pretrained(repo_id).position]
    assert holds(repo_id, organ(base, seed))
    assert ("model.safetensors" in api.list_repo_files(repo_id)) == (seed == 2)


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_se cret", "hf_sécret"])
def test_a_token_that_cannot_be_sent_is_not_spelled_out(token, base, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    for attempt in (
        lambda: organ(base, 1).push_to_hub("me/with-token", token=token),
        lambda: DonorModel.from_pretrained("me/with-token", token=token),
        lambda: list_donors(token=token),
    ):
        with pytest.raises(NotHFError, match=r"the token holds a line break, a space or .*; copy it again") as raised:
            attempt()
        assert "cret" not in "".join(traceback.format_exception(raised.value)).replace("test_push.py", "")
    for command in (("push", tmp_path, "me/with-token"), ("inspect", "me/with-token")):
        assert "cret" not in failed(*command, "--token", token)
