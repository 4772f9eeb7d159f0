"""Repos of the local Hub: who may see them, and how they are found."""

import pytest
from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import paginate

from local_hub import Hub
from local_hub.card import model_tags
from testing.hub import CARD, read, upload


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


@pytest.mark.slow
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
