"""What is done for older releases agrees with what newer ones do by themselves."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers import Gemma3TextConfig
from transformers.utils import hub as transformers_hub

from local_hub import Fault
from not_hf.architecture import releases
from not_hf.architecture.releases import Commit, make_config, of_dtype, pin_revision
from not_hf.architecture.upstream import commit_of, fetch_file
from testing.hub import upload
from testing.models import tiny_model

REPO = "me/releases"


@pytest.fixture(scope="module")
def repo(hub) -> str:
    """With a tag, a branch and a pull request."""
    api = HfApi()
    api.create_repo(REPO)
    api.create_tag(REPO, tag="v1", revision=upload(api, REPO, "config.json", b"v1"))
    upload(api, REPO, "config.json", b"main")
    upload(api, REPO, "config.json", b"refs/pr/1", create_pr=True)
    return REPO


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "main", None])
def test_a_revision_is_pinned_to_its_commit(revision, repo, api, hub, tmp_path):
    content = Path(hf_hub_download(repo, "config.json", revision=revision, cache_dir=tmp_path / "before")).read_bytes()
    pinned = pin_revision(repo, revision, cache_dir=tmp_path)
    assert pinned == commit_of(pinned) == api.model_info(repo, revision=revision).sha
    assert (tmp_path / "models--me--releases" / "refs" / (revision or "main")).read_text() == pinned
    assert copy.deepcopy(pinned).resolved == pickle.loads(pickle.dumps(pinned)).resolved == pinned
    if revision != "v1":
        upload(api, repo, "config.json", b"later", revision=revision)
    assert Path(fetch_file(repo, "config.json", revision=pinned, cache_dir=tmp_path)).read_bytes() == content
    hub.requests.clear()
    assert pin_revision(repo, revision, cache_dir=tmp_path, local_files_only=True) == pinned
    assert pin_revision(repo, str(pinned), cache_dir=tmp_path) == pinned
    assert not hub.requests


@pytest.mark.skipif(not hasattr(transformers_hub, "resolve_revision"), reason="this release has none to compare with")
@pytest.mark.parametrize("revision", ["v1", "main", None, "gone", "../main"])
@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("state", ["up", "down", "offline", "closed"])
def test_it_is_pinned_as_transformers_does_it(state, noted, revision, repo, api, hub, tmp_path, no_waiting):
    results = []
    for n, resolve in enumerate((pin_revision, transformers_hub.resolve_revision)):
        hub.fault = None
        if noted:
            resolve(repo, revision, cache_dir=tmp_path / str(n))
        if state == "down":
            hub.fault = lambda *request: Fault(status=503)
        how = {"token": False if state == "closed" else None, "local_files_only": state == "offline"}
        found = resolve(repo if state != "closed" else "me/not-there", revision, cache_dir=tmp_path / str(n), **how)
        results.append((commit_of(found), found if commit_of(found) is None else None))
    assert results[0] == results[1]


def test_folders_names_that_are_none_and_notes_that_are_none_are_left_alone(tmp_path):
    assert pin_revision(str(tmp_path), "main") == "main"
    assert pin_revision("no such/folder/here", "v1") == "v1"
    note = tmp_path / "models--me--noted" / "refs" / "main"
    note.parent.mkdir(parents=True)
    note.write_text("what is this")
    assert pin_revision("me/noted", cache_dir=tmp_path, local_files_only=True) is None


def test_a_file_that_a_commit_lacks_is_asked_for_once(repo, api, hub, tmp_path):
    pinned = pin_revision(repo, "v1", cache_dir=tmp_path)
    assert isinstance(pinned, Commit)
    asked = []
    for _ in range(2):
        hub.requests.clear()
        assert fetch_file(repo, "absent.json", revision=pinned, cache_dir=tmp_path) is None
        asked.append(len(hub.requests))
    assert asked == [1, 0]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_config_without_one_of_the_layer_types(is_old, monkeypatch):
    """Whose rotary embeddings its values name."""
    if is_old:
        monkeypatch.setattr(releases, "_NEEDS_ALL_TYPES", True)
    values = tiny_model("gemma3_text").config.to_dict()
    whole = make_config(Gemma3TextConfig, values)
    part = make_config(Gemma3TextConfig, {**values, "layer_types": ["sliding_attention"], "num_hidden_layers": 1})
    assert part.rope_parameters == whole.rope_parameters
    assert part.layer_types == ["sliding_attention"] and part.num_hidden_layers == 1
    assert part.to_dict().keys() == whole.to_dict().keys()


def test_a_model_without_parameters_tells_a_dtype():
    model = tiny_model("llama").model
    for name in ("layers", "embed_tokens", "norm"):
        delattr(model, name)
    with of_dtype(model, torch.bfloat16):
        assert model.dtype == torch.bfloat16
    assert not list(model.parameters())
