"""The local Hub, spoken to by the real client: what holds here is what the other tests rely on."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    _CACHED_NO_EXIST,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
from huggingface_hub.utils import build_hf_headers, get_session, paginate
from safetensors.torch import save_file

from local_hub import DEFAULT_TOKEN, Fault, FaultHook, Hub, Record
from local_hub.card import model_tags
from testing import ROOT

WEIGHTS = bytes(range(256)) * 40  # 10 kB
CARD = """---
base_model: me/search-base
base_model_relation: adapter
library_name: not_hf
license: mit
datasets: [me/server-data]
tags: [organ]
---
# Card
"""


@pytest.fixture
def repo(api: HfApi, request: pytest.FixtureRequest) -> str:
    """A repository of the test's own."""
    return api.create_repo(f"me/{request.node.name}").repo_id


def upload(api: HfApi, repo: str, path: str, content: bytes, **kwargs: object) -> str:
    """Commit one file; returns the commit's hash."""
    return api.upload_file(repo_id=repo, path_in_repo=path, path_or_fileobj=content, **kwargs).oid


def read(repo: str, path: str, **kwargs: object) -> bytes:
    """Download one file."""
    return Path(hf_hub_download(repo, path, **kwargs)).read_bytes()


def served(hub: Hub, method: str, part: str) -> list[Record]:
    """The requests so far of one method to an address that contains `part`."""
    return [record for record in hub.requests if record.method == method and part in record.path]


def once(fault: Fault, method: str, part: str) -> FaultHook:
    """A hook that makes the first matching request go wrong."""
    left = [fault]

    def hook(asked: str, path: str, headers: Mapping[str, str]) -> Fault | None:
        return left.pop() if left and asked == method and part in path else None

    return hook


# Files


def test_small_and_lfs_files_come_back_as_sent(hub: Hub, api: HfApi, repo: str, tmp_path: Path) -> None:
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "sub dir" / "ünï 100%#?.txt").write_bytes(b"text")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    api.upload_folder(repo_id=repo, folder_path=tmp_path)

    assert read(repo, "sub dir/ünï 100%#?.txt") == b"text"
    assert read(repo, "model.safetensors") == WEIGHTS
    folder = Path(snapshot_download(repo, local_dir=tmp_path / "copy"))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    by_path = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}
    assert by_path["model.safetensors"].lfs.size == len(WEIGHTS)
    assert by_path["sub dir/ünï 100%#?.txt"].lfs is None
    assert set(by_path) == {".gitattributes", "model.safetensors", "sub dir", "sub dir/ünï 100%#?.txt"}
    assert len(served(hub, "PUT", "/lfs/")) == 1


def test_unchanged_files_make_no_commit(hub: Hub, api: HfApi, repo: str) -> None:
    files = {"config.json": b"{}", "model.bin": WEIGHTS}
    first = api.create_commit(
        repo, [CommitOperationAdd(path, content) for path, content in files.items()], commit_message="both"
    )
    hub.requests.clear()
    again = api.create_commit(
        repo, [CommitOperationAdd(path, content) for path, content in files.items()], commit_message="again"
    )
    assert again.oid == first.oid
    assert served(hub, "POST", "/commit/") == served(hub, "PUT", "/lfs/") == []


def test_files_are_copied_and_deleted(api: HfApi, repo: str) -> None:
    upload(api, repo, "a/model.bin", WEIGHTS)
    upload(api, repo, "a/note.txt", b"note")
    operations = [
        CommitOperationCopy("a/model.bin", "b/model.bin"),
        CommitOperationCopy("a/note.txt", "b/note.txt"),
        CommitOperationDelete("a/"),
    ]
    api.create_commit(repo, operations, commit_message="move")
    assert read(repo, "b/model.bin") == WEIGHTS
    api.delete_files(repo, ["b/*.txt"])
    assert api.list_repo_files(repo) == [".gitattributes", "b/model.bin"]


def test_resolve_tells_etag_commit_and_size(api: HfApi, repo: str) -> None:
    upload(api, repo, "config.json", b"{}")
    commit = upload(api, repo, "model.bin", WEIGHTS)
    small = api.get_hf_file_metadata(url=f"{api.endpoint}/{repo}/resolve/main/config.json")
    large = api.get_hf_file_metadata(url=f"{api.endpoint}/{repo}/resolve/main/model.bin")
    blobs = {file.rfilename: file for file in api.model_info(repo, files_metadata=True).siblings}

    assert (small.commit_hash, small.size, small.etag) == (commit, 2, blobs["config.json"].blob_id)
    assert (large.commit_hash, large.size, large.etag) == (
        commit,
        len(WEIGHTS),
        blobs["model.bin"].lfs.sha256,
    )
    assert large.location.startswith("http://localhost:")  # another host: storage, not a renamed repository
    assert small.xet_file_data is large.xet_file_data is None


@pytest.mark.parametrize("path", ["small.txt", "large.bin"])
@pytest.mark.parametrize(
    ("header", "part"),
    [("bytes=0-9", slice(10)), ("bytes=100-", slice(100, None)), ("bytes=-7", slice(-7, None))],
)
def test_ranges(hub: Hub, api: HfApi, path: str, header: str, part: slice) -> None:
    repo = api.create_repo("me/ranges", exist_ok=True).repo_id
    upload(api, repo, path, WEIGHTS)
    url = f"{api.endpoint}/{repo}/resolve/main/{path}"
    hub.requests.clear()
    answer = get_session().get(url, headers={**build_hf_headers(), "Range": header})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[part])
    assert answer.headers["Content-Range"].endswith(f"/{len(WEIGHTS)}")
    assert sum(record.bytes for record in hub.requests) == len(WEIGHTS[part])

    outside = get_session().get(url, headers={**build_hf_headers(), "Range": f"bytes={len(WEIGHTS)}-"})
    assert (outside.status_code, outside.headers["Content-Range"]) == (416, f"bytes */{len(WEIGHTS)}")
    changed = get_session().get(url, headers={**build_hf_headers(), "Range": header, "If-Range": '"old"'})
    assert (changed.status_code, changed.content) == (200, WEIGHTS)


def test_storage_links_must_be_signed(api: HfApi, repo: str) -> None:
    upload(api, repo, "model.bin", WEIGHTS)
    link = api.get_hf_file_metadata(url=f"{api.endpoint}/{repo}/resolve/main/model.bin").location
    assert get_session().get(link).content == WEIGHTS
    assert get_session().get(link[:-1] + "x").status_code == 403
    assert get_session().put(link, content=WEIGHTS).status_code == 403


def test_storage_refuses_other_content_than_announced(api: HfApi, repo: str) -> None:
    content = os.urandom(100)  # the store knows no such file yet, whichever tests ran before
    announced = UploadInfo.from_bytes(content)
    ((answer,), _, _) = post_lfs_batch_info([announced], token=None, repo_type="model", repo_id=repo)
    link = answer["actions"]["upload"]["href"]
    assert get_session().put(link, content=content[:-1]).status_code == 400
    assert get_session().put(link, content=content).status_code == 200
    ((answer,), _, _) = post_lfs_batch_info([announced], token=None, repo_type="model", repo_id=repo)
    assert "actions" not in answer


# Revisions


def test_branches_tags_and_hashes(api: HfApi, repo: str) -> None:
    first = upload(api, repo, "x.txt", b"1")
    api.create_tag(repo, tag="v1/rc", tag_message="one")
    api.create_branch(repo, branch="dev/new", revision=first)
    second = upload(api, repo, "x.txt", b"2", revision="dev/new")

    contents = {revision: read(repo, "x.txt", revision=revision) for revision in ("main", "dev/new", "v1/rc", second)}
    assert contents == {"main": b"1", "dev/new": b"2", "v1/rc": b"1", second: b"2"}
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "dev/new": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1/rc": first}
    latest = {file.path: file.last_commit.oid for file in api.list_repo_tree(repo, revision=second, expand=True)}
    assert latest["x.txt"] == second != latest[".gitattributes"]
    titles = [commit.title for commit in api.list_repo_commits(repo, revision="dev/new")]
    assert titles == ["Upload x.txt with huggingface_hub"] * 2 + ["initial commit"]
    with pytest.raises(RevisionNotFoundError):
        read(repo, "x.txt", revision=second[:7])
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="dev/new")
    api.create_branch(repo, branch="dev/new", exist_ok=True)
    api.delete_branch(repo, branch="dev/new")
    api.delete_tag(repo, tag="v1/rc")
    assert [ref.name for ref in api.list_repo_refs(repo).branches] == ["main"]


def test_pull_requests_leave_main_alone(hub: Hub, api: HfApi, repo: str) -> None:
    hub.add_user("guest", token="hf_guest")
    guest = HfApi(token="hf_guest")
    info = guest.upload_file(repo_id=repo, path_in_repo="new.bin", path_or_fileobj=WEIGHTS, create_pr=True)
    assert (info.pr_revision, info.pr_num) == ("refs/pr/1", 1)
    assert read(repo, "new.bin", revision="refs/pr/1") == WEIGHTS
    assert "new.bin" not in api.list_repo_files(repo)
    upload(guest, repo, "more.txt", b"more", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="403"):
        upload(guest, repo, "more.txt", b"more")
    assert {"more.txt", "new.bin"} < set(api.list_repo_files(repo, revision="refs/pr/1"))
    assert api.create_pull_request(repo, title="second").git_reference == "refs/pr/2"
    assert [ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == [
        "refs/pr/1",
        "refs/pr/2",
    ]
    assert [(found.num, found.author) for found in api.get_repo_discussions(repo)] == [
        (2, "me"),
        (1, "guest"),
    ]


# Commits that fail


def test_failed_commit_changes_nothing(api: HfApi, repo: str) -> None:
    before = upload(api, repo, "x.txt", b"1")
    new = CommitOperationAdd("new.txt", b"new")
    with pytest.raises(EntryNotFoundError, match="trailing '/'"):
        api.create_commit(repo, [new, CommitOperationDelete("missing.txt")], commit_message="bad")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, [new], commit_message="late", parent_commit="0" * 40)
    assert api.model_info(repo).sha == before
    assert api.list_repo_files(repo) == [".gitattributes", "x.txt"]


def test_commit_refuses_lfs_content_that_was_not_uploaded(api: HfApi, repo: str) -> None:
    ghost = CommitOperationAdd("model.bin", WEIGHTS + b"never sent")
    ghost._is_uploaded, ghost._upload_mode = True, "lfs"
    with pytest.raises(BadRequestError, match="not uploaded"):
        api.create_commit(repo, [CommitOperationAdd("a.txt", b"a"), ghost], commit_message="ghost")
    assert api.list_repo_files(repo) == [".gitattributes"]


# Who may do what


def test_errors_have_the_class_of_their_cause(api: HfApi, repo: str) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/none")
    with pytest.raises(RepositoryNotFoundError):
        read("gpt2", "config.json")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="none")
    with pytest.raises(EntryNotFoundError):
        read(repo, "none.txt")
    assert try_to_load_from_cache(repo, "none.txt") is _CACHED_NO_EXIST  # and need not ask again
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("somebody/else")
    api.delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(repo)
    api.delete_repo(repo, missing_ok=True)


def test_bad_token(api: HfApi, repo: str) -> None:
    assert api.whoami()["name"] == "me"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="401") as caught:
        api.model_info(repo, token="hf_wrong")
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_private_repository_looks_missing(hub: Hub, api: HfApi, repo: str) -> None:
    upload(api, repo, "x.txt", b"1")
    hub.add_user("guest", token="hf_guest")
    assert api.model_info(repo, token=False).private is False
    api.update_repo_settings(repo, private=True)
    assert api.model_info(repo).private is True
    for token in (False, "hf_guest"):
        with pytest.raises(RepositoryNotFoundError):
            read(repo, "x.txt", token=token)
        assert repo not in [model.id for model in api.list_models(token=token)]
    assert read(repo, "x.txt") == b"1"


def test_gated_repository_shows_its_listing_only(hub: Hub, api: HfApi, repo: str) -> None:
    upload(api, repo, "x.txt", b"1")
    for name in ("guest", "friend"):
        hub.add_user(name, token=f"hf_{name}")
    hub.gate(repo, users=("friend",))
    assert api.model_info(repo, token="hf_guest").gated == "auto"
    for token in (False, "hf_guest"):
        with pytest.raises(GatedRepoError):
            read(repo, "x.txt", token=token)
        with pytest.raises(GatedRepoError):
            api.auth_check(repo, token=token)
    assert read(repo, "x.txt", token="hf_friend") == b"1"
    with pytest.raises(HfHubHTTPError, match="403"):
        upload(HfApi(token="hf_friend"), repo, "y.txt", b"2")


# Finding


def test_search_by_tags_the_hub_derives(api: HfApi) -> None:
    for name, card in {
        "organ": CARD,
        "tune": CARD.replace("adapter", "finetune"),
        "plain": "# no metadata",
    }.items():
        repo = api.create_repo(f"me/search-{name}").repo_id
        if name == "plain":
            with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
                upload(api, repo, "README.md", card.encode())
        else:
            upload(api, repo, "README.md", card.encode())

    def found(**query: object) -> list[str]:
        return [model.id for model in api.list_models(**query)]

    assert found(filter="base_model:adapter:me/search-base") == ["me/search-organ"]
    assert found(filter="base_model:me/search-base") == ["me/search-tune", "me/search-organ"]
    assert found(filter=["organ", "base_model:finetune:me/search-base"]) == ["me/search-tune"]
    assert found(search="SEARCH-pl", author="me") == ["me/search-plain"]
    assert found(search="search-", author="you") == []
    assert found(search="organ SEARCH-") == ["me/search-organ"]  # words in any order
    with pytest.raises(BadRequestError, match="baseModels"):
        found(expand=["baseModels"])  # shown of one model at a time
    assert found(search="search-", sort="created_at", limit=1) == ["me/search-plain"]
    assert found(trained_dataset="me/server-data", filter="not_hf", search="search-organ") == ["me/search-organ"]
    info = api.model_info("me/search-organ")
    assert (info.library_name, info.card_data.license) == ("not_hf", "mit")
    assert {"not_hf", "organ", "license:mit", "dataset:me/server-data", "region:us"} < set(info.tags)
    (full,) = api.list_models(filter="base_model:adapter:me/search-base", full=True, cardData=True)
    assert full.sha == info.sha
    assert full.card_data.base_model == "me/search-base"
    pages = paginate(f"{api.endpoint}/api/models", {"search": "search-", "limit": 1}, headers={})
    assert len({model["id"] for model in pages}) == 3


@pytest.mark.parametrize(
    ("card", "path", "relation"),
    [
        ({"base_model": "a/b"}, "model.safetensors", "finetune"),
        ({"base_model": "a/b"}, "adapter_config.json", "adapter"),
        ({"base_model": "a/b"}, "model.gguf", "quantized"),
        ({"base_model": ["a/b", "c/d"]}, "model.safetensors", "merge"),
        ({"base_model": "a/b", "base_model_relation": "merge"}, "adapter_config.json", "merge"),
    ],
)
def test_relation_to_the_base_model_is_guessed(card: dict, path: str, relation: str) -> None:
    tags = [tag for tag in model_tags(card, [path], {}) if tag.startswith("base_model:")]
    assert tags[:2] == ["base_model:a/b", f"base_model:{relation}:a/b"]


def test_card_validation(api: HfApi, repo: str) -> None:
    ModelCard(CARD).validate()
    with pytest.raises(ValueError, match='"tags" must be an array'):
        upload(api, repo, "README.md", CARD.replace("[organ]", "organ").encode())
    with pytest.raises(ValueError, match="base_model_relation"):
        ModelCard(CARD.replace("adapter", "parent")).validate()


# What other libraries ask for


def test_safetensors_metadata_reads_the_header_only(hub: Hub, api: HfApi, repo: str, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(500, 200)}, weights)  # 400 kB
    api.upload_file(repo_id=repo, path_in_repo=weights.name, path_or_fileobj=weights)
    hub.requests.clear()
    metadata = api.get_safetensors_metadata(repo)
    assert metadata.parameter_count == {"F32": 100_000}
    assert sum(record.bytes for record in served(hub, "GET", "/lfs/")) == 100_001


def test_transformers_round_trip(api: HfApi, repo: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    model.push_to_hub(repo)
    assert AutoConfig.from_pretrained(repo).n_embd == 8
    loaded = AutoModelForCausalLM.from_pretrained(repo)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight)
    info = api.model_info(repo)
    assert info.library_name == "transformers"
    assert {"gpt2", "safetensors"} < set(info.tags)
    assert "no endpoint for" not in caplog.text


def test_dataset_loads(api: HfApi, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset, load_dataset

    Dataset.from_dict({"text": ["a", "b", "c"]}).push_to_hub("me/server-data")
    api.upload_file(
        repo_id="me/server-data", repo_type="dataset", path_in_repo="extra.csv", path_or_fileobj=b"text\nd\n"
    )
    assert load_dataset("me/server-data", split="train", cache_dir=tmp_path)["text"] == ["a", "b", "c"]
    extra = load_dataset("me/server-data", data_files="extra.csv", split="train", cache_dir=tmp_path)
    assert extra["text"] == ["d"]
    assert [found.id for found in api.list_datasets(search="server-d")] == ["me/server-data"]
    assert "no endpoint for" not in caplog.text


def test_file_system(api: HfApi, repo: str) -> None:
    upload(api, repo, "sub/model.bin", WEIGHTS)
    files = HfFileSystem()
    assert files.ls(f"{repo}/sub", detail=False) == [f"{repo}/sub/model.bin"]
    assert files.info(f"{repo}/sub/model.bin")["size"] == len(WEIGHTS)
    with files.open(f"{repo}/sub/model.bin", "rb", block_size=64) as file:
        file.seek(300)
        assert file.read(10) == WEIGHTS[300:310]
    with files.open(f"{repo}/new.txt", "w") as file:
        file.write("new")
    assert read(repo, "new.txt") == b"new"


# When things go wrong


def test_rate_limit_is_waited_for(hub: Hub, api: HfApi, repo: str, no_waiting: list[float]) -> None:
    upload(api, repo, "x.txt", b"1")
    hub.fault = once(Fault(status=429, retry_after=7), "GET", "/resolve/")
    assert read(repo, "x.txt") == b"1"
    assert [record.status for record in served(hub, "GET", "/resolve/")] == [429, 200]
    assert 8.0 in no_waiting  # the client adds a second


def test_truncated_download_is_resumed(
    hub: Hub, api: HfApi, repo: str, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(api, repo, "model.bin", WEIGHTS)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # keep what came before the cut
    hub.fault = once(Fault(truncate=True), "GET", "/lfs/")
    assert read(repo, "model.bin") == WEIGHTS
    first, second = served(hub, "GET", "/lfs/")
    assert (first.status, first.bytes) == (200, len(WEIGHTS) // 2)
    assert (second.status, second.range) == (206, f"bytes={len(WEIGHTS) // 2}-")


@pytest.mark.parametrize(
    ("fault", "status", "part"),
    [(Fault(ignore_range=True), 200, slice(None)), (Fault(shift_range=5), 206, slice(15, 25))],
)
def test_wrong_range(hub: Hub, api: HfApi, fault: Fault, status: int, part: slice) -> None:
    repo = api.create_repo("me/wrong-range", exist_ok=True).repo_id
    upload(api, repo, "small.txt", WEIGHTS)
    url = f"{api.endpoint}/{repo}/resolve/main/small.txt"
    hub.fault = once(fault, "GET", "/resolve/")
    wrong, right = (get_session().get(url, headers={"Range": "bytes=10-19"}) for _ in range(2))
    assert (wrong.status_code, wrong.content) == (status, WEIGHTS[part])
    assert (right.status_code, right.content) == (206, WEIGHTS[10:20])


def test_changed_etag_and_delay(hub: Hub, api: HfApi, repo: str, no_waiting: list[float]) -> None:
    upload(api, repo, "model.bin", WEIGHTS)
    url = f"{api.endpoint}/{repo}/resolve/main/model.bin"
    hub.fault = once(Fault(etag="other", delay=3), "HEAD", "/resolve/")
    assert api.get_hf_file_metadata(url=url).etag == "other"
    assert 3 in no_waiting
    assert api.get_hf_file_metadata(url=url).etag != "other"


def test_cached_files_outlive_the_hub(tmp_path: Path, no_waiting: list[float]) -> None:
    with Hub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint)
        repo = api.create_repo("me/gone").repo_id
        commit = upload(api, repo, "model.bin", WEIGHTS)
        cache = {"cache_dir": tmp_path / "cache", "endpoint": hub.endpoint}
        snapshot_download(repo, **cache)
    hub.requests.clear()
    assert read(repo, "model.bin", **cache) == WEIGHTS
    assert read(repo, "model.bin", **cache, local_files_only=True) == WEIGHTS
    assert commit in snapshot_download(repo, **cache, local_files_only=True)
    with pytest.raises(LocalEntryNotFoundError):
        read(repo, "other.bin", **cache)
    assert hub.requests == []  # connections that the client kept open were cut

    with Hub(tmp_path / "hub") as restarted:
        assert HfApi(endpoint=restarted.endpoint).model_info(repo).sha == commit
        new = {"cache_dir": tmp_path / "new cache", "endpoint": restarted.endpoint}
        assert read(repo, "model.bin", **new) == WEIGHTS


def test_unknown_address_is_an_error_and_a_logged_line(hub: Hub, api: HfApi, caplog: pytest.LogCaptureFixture) -> None:
    answer = get_session().get(f"{hub.endpoint}/api/nothing")
    assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "UnknownEndpoint")
    assert "no endpoint for GET /api/nothing" in caplog.text


# Xet and the command line, each in a process of its own: the client reads its settings once, at import

XET_UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
repo = api.create_repo("me/xet").repo_id
print(api.upload_file(repo_id=repo, path_in_repo="one.bin", path_or_fileobj=sys.argv[1]).oid)
print(api.upload_folder(repo_id=repo, folder_path=sys.argv[2], create_pr=True).pr_revision)
"""
XET_DOWNLOAD = """
from huggingface_hub import hf_hub_download, snapshot_download
print(hf_hub_download("me/xet", "one.bin"))
print(snapshot_download("me/xet", revision="refs/pr/1"))
"""


def run_client(script: str, endpoint: str, home: Path, *args: object, xet: bool = True) -> list[str]:
    """Lines a script prints that runs with a client of its own."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": DEFAULT_TOKEN, "HF_HOME": str(home)}
    environment["HF_HUB_DISABLE_XET"] = "0" if xet else "1"
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_xet_round_trip(tmp_path: Path) -> None:
    content = os.urandom(300_000) + b"compressible" * 20_000
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "one.bin").write_bytes(content)
    (folder / "two.safetensors").write_bytes(content[::-1])
    (folder / "note.txt").write_bytes(b"note")
    with Hub(tmp_path / "hub", xet=True) as hub:
        home = tmp_path / "home"
        oid, revision = run_client(XET_UPLOAD, hub.endpoint, home, tmp_path / "one.bin", folder)
        assert (len(oid), revision) == (40, "refs/pr/1")
        assert served(hub, "POST", "/cas/v1/xorbs/")
        assert not served(hub, "PUT", "/lfs/")

        hub.requests.clear()
        one, pull = run_client(XET_DOWNLOAD, hub.endpoint, tmp_path / "home 2")
        assert Path(one).read_bytes() == content
        assert Path(pull, "two.safetensors").read_bytes() == content[::-1]
        assert Path(pull, "note.txt").read_bytes() == b"note"
        assert served(hub, "GET", "/xorb/")
        assert not served(hub, "GET", "/lfs/")

        hub.requests.clear()
        one, pull = run_client(XET_DOWNLOAD, hub.endpoint, tmp_path / "home 3", xet=False)
        assert Path(one).read_bytes() == content
        assert served(hub, "GET", "/lfs/")
        assert not served(hub, "GET", "/xorb/")


def test_command_line_serves_until_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "local_hub", "--root", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint = process.stdout.readline().strip()
            assert HfApi(endpoint=endpoint).whoami()["name"] == "me"
        finally:
            process.kill()
