"""An organ inherits the licence of its base, unless one is given; finding it out never costs an organ."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
)
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from local_hub import Fault, Hub
from not_hf import DonorConfig, DonorModel, TransplantedForCausalLM, compose, push_donor
from not_hf.cards import common as readme
from not_hf.cards.license import License, joint_license
from not_hf.cli import app
from testing.models import tiny_model

_numbers = itertools.count()

OTHER = "license: other\nlicense_name: house-rules\nlicense_link: ./LICENSE.md"


@pytest.fixture
def licensed(hub: Hub, base_folder) -> Iterator[Callable[..., str]]:
    """Pushes a tiny llama with that metadata (or those bytes, or nothing) as its card; returns its ID."""

    def push(metadata: str | bytes | None = "license: apache-2.0") -> str:
        repo = HfApi().create_repo(f"me/licensed-{next(_numbers)}").repo_id
        HfApi().upload_folder(repo_id=repo, folder_path=base_folder("llama"))
        if metadata is not None:
            text = f"---\n{metadata}\n---\n# Base\n".encode() if isinstance(metadata, str) else metadata
            write_unchecked(hub, repo, text)
        hub.requests.clear()
        return repo

    yield push
    hub.fault = None


def write_unchecked(hub: Hub, repo: str, text: bytes) -> None:
    """Commit a README.md as another file, then rename it: the Hub takes no card that it cannot read."""
    HfApi().create_commit(repo, [CommitOperationAdd("card.txt", text)], commit_message="card")
    move = [CommitOperationCopy("card.txt", "README.md"), CommitOperationDelete("card.txt")]
    HfApi().create_commit(repo, move, commit_message="rename")


def asked_for_cards(hub: Hub) -> list[str]:
    return [f"{record.method} {record.path}" for record in hub.requests if "README.md" in record.path]


def stated(config: DonorConfig) -> tuple:
    return config.license, config.license_name, config.license_link


# ------------------------------------------------------------------------------------------ where it comes from


def test_the_licence_is_that_of_the_pinned_commit(licensed):
    base = licensed(OTHER)
    commit = HfApi().model_info(base).sha
    HfApi().upload_file(repo_id=base, path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\n")
    assert DonorModel.from_base(base, layers=(1, 3)).config.license == "mit"
    config = DonorModel.from_base(base, layers=(1, 3), revision=commit).config
    link = f"https://huggingface.co/{base}/blob/{commit}/LICENSE.md"  # the organ's repo has no such file
    assert stated(config) == ("other", "house-rules", link)
    config.license = "mit"
    assert License.of(config).metadata() == {"license": "mit"}  # what `other` stood for does not hold for it


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, None),
        ("language: en", None),
        ("license: apache-2.0", "apache-2.0"),
        ("license: [mit, apache-2.0]", ["mit", "apache-2.0"]),
        ("license: 3", None),
        ("license: [mit, {a: b}]", None),
        ("license: other\nlicense_name: [a]", "other"),
        (b"# only text, license: mit", None),
    ],
)
def test_what_a_card_may_say(licensed, metadata, expected, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="not_hf"):
        donor = DonorModel.from_base(licensed(metadata), layers=(1, 3))
    assert caplog.messages == []
    donor.save_pretrained(tmp_path)
    for config in (donor.config, DonorConfig.from_pretrained(tmp_path)):
        assert stated(config) == (expected, None, None)
    card = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert card.get("license") == expected and "license_name" not in card


@pytest.mark.parametrize("card", ["a: [", "[1, 2]", b"---\nlicense: \xff\n---\n"])
def test_an_unreadable_card_costs_no_organ(licensed, card, caplog):
    with caplog.at_level(logging.WARNING, logger="not_hf"):
        config = DonorModel.from_base(licensed(card), layers=(1, 3)).config
    assert config.license is None
    (message,) = caplog.messages
    assert "is unknown, since its card cannot be read" in message and "\n" not in message


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(status=403), Fault(truncate=True)])
def test_a_card_that_cannot_be_fetched_costs_no_organ(hub, licensed, fault, monkeypatch):
    base = licensed()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault = lambda method, path, headers: fault if "README.md" in path else None
    assert DonorModel.from_base(base, layers=(1, 3)).config.license is None
    assert asked_for_cards(hub)


def test_a_folder(base_folder, tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    assert DonorModel.from_base(base, layers=(1, 3)).config.license is None
    (base / "README.md").write_text(f"---\n{OTHER}\n---\n")
    config = DonorModel.from_base(base, layers=(1, 3)).config
    assert stated(config) == ("other", "house-rules", None)  # a link into the folder leads nowhere from elsewhere
    live = AutoModelForCausalLM.from_pretrained(base)
    assert DonorModel.from_base(live, layers=(1, 3)).config.license == "other"
    (base / "README.md").write_text("---\nlicense: [other, mit]\nlicense_name: house-rules\n---\n")  # of a merge
    config = DonorModel.from_base(base, layers=(1, 3)).config
    assert stated(config) == (["other", "mit"], "house-rules", None)


def test_a_live_model_asks_nothing_of_the_network(hub, licensed):
    base = licensed()
    live = AutoModelForCausalLM.from_pretrained(base)
    hub.requests.clear()
    assert DonorModel.from_base(live, layers=(1, 3)).config.license is None
    assert hub.requests == []
    hf_hub_download(base, "README.md")  # it is at hand from now on
    hub.requests.clear()
    assert DonorModel.from_base(live, layers=(1, 3)).config.license == "apache-2.0"
    assert hub.requests == []


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["license: mit", None])
def test_a_card_is_asked_for_once_and_never_by_loading(hub, licensed, metadata, tmp_path):
    base = licensed(metadata)
    donor = DonorModel.from_base(base, layers=(1, 3))
    assert asked_for_cards(hub)
    hub.requests.clear()
    DonorModel.from_base(base, layers=(0, 1)).save_pretrained(tmp_path)
    donor.config.license = None
    donor.save_pretrained(tmp_path)
    TransplantedForCausalLM.from_pretrained(tmp_path)
    DonorModel.from_pretrained(tmp_path)
    assert asked_for_cards(hub) == []


# ----------------------------------------------------------------------------------------- a licence that is given


def test_a_given_licence_wins(hub, licensed, tmp_path):
    base = licensed()
    donor = DonorModel.from_base(base, layers=(1, 3), license="cc0-1.0")
    assert stated(donor.config) == ("cc0-1.0", None, None)
    assert asked_for_cards(hub) == []
    out = tmp_path / "organ"
    done = CliRunner().invoke(app, ["extract", base, "--layers", "1:3", "-o", str(out), "--license", "cc-by-4.0"])
    assert done.exit_code == 0, done.stderr
    assert ModelCard.load(out / "README.md").data.license == "cc-by-4.0"
    assert asked_for_cards(hub) == []
    donor.config.license = "mit"
    donor.save_pretrained(tmp_path / "mine")
    assert ModelCard.load(tmp_path / "mine" / "README.md").data.license == "mit"


def test_a_licence_in_the_card_stays(licensed, tmp_path, caplog):
    readme.warn_once.cache_clear()
    donor = DonorModel.from_base(licensed(), layers=(1, 3))
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: other\nlicense_name: mine\n---\nText.\n")
    with caplog.at_level(logging.WARNING, logger="not_hf"):
        donor.save_pretrained(tmp_path)
        donor.save_pretrained(tmp_path)
    data = ModelCard.load(path).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", None)
    (message,) = caplog.messages
    assert "keeps the licence it has, 'other', not 'apache-2.0'" in message


# -------------------------------------------------------------------------------------------------------- pushing


@pytest.mark.slow
def test_it_is_looked_up_when_pushed(hub, licensed, tmp_path):
    base = licensed(OTHER)
    live = AutoModelForCausalLM.from_pretrained(base)
    donor = DonorModel.from_base(live, layers=(1, 3))
    donor.save_pretrained(tmp_path)
    model = TransplantedForCausalLM.from_pretrained(live, donor)
    assert donor.config.license is None
    model.push_to_hub("me/licensed-model")
    assert model.donor_config["default"].license == "other"
    donor.push_to_hub("me/licensed-organ")
    pushed = CliRunner().invoke(app, ["push", str(tmp_path), "me/licensed-folder"])
    assert pushed.exit_code == 0, pushed.stderr
    for repo in ("me/licensed-model", "me/licensed-organ", "me/licensed-folder"):
        link = f"https://huggingface.co/{base}/blob/main/LICENSE.md"
        assert stated(DonorConfig.from_pretrained(repo)) == ("other", "house-rules", link)
        card = ModelCard.load(repo)
        card.validate()
        assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "house-rules", link)
        assert "license:other" in HfApi().model_info(repo).tags


def test_a_push_that_fails_leaves_the_licence_as_it_was(licensed):
    live = AutoModelForCausalLM.from_pretrained(licensed("license: mit"))
    donor = DonorModel.from_base(live, layers=(1, 3))
    model = TransplantedForCausalLM.from_pretrained(live, donor)
    for pushed in (model, donor):
        with pytest.raises(OSError, match="403"):
            pushed.push_to_hub("somebody-else/organ")
    assert stated(model.donor_config["default"]) == stated(donor.config) == (None, None, None)


@pytest.mark.slow
def test_that_of_a_composition_is_looked_up_when_pushed(hub, licensed, tmp_path):
    live = AutoModelForCausalLM.from_pretrained(licensed(OTHER))
    for name in ("one", "two"):
        DonorModel.from_base(live, layers=(1, 3)).save_pretrained(tmp_path / name)
    compose([tmp_path / "one", tmp_path / "two"]).save_pretrained(tmp_path / "both")
    assert DonorConfig.from_pretrained(tmp_path / "both").license is None
    push_donor(tmp_path / "both", "me/licensed-composition")
    link = f"https://huggingface.co/{live.config.name_or_path}/blob/main/LICENSE.md"
    assert stated(DonorConfig.from_pretrained("me/licensed-composition")) == ("other", "house-rules", link)
    assert ModelCard.load("me/licensed-composition").data.license_name == "house-rules"


def test_a_base_that_is_gone_is_no_reason_not_to_push(hub, licensed, tmp_path):
    base = licensed(None)
    donor = DonorModel.from_base(base, layers=(1, 3))
    HfApi().delete_repo(base)
    donor.push_to_hub("me/organ-without-base")
    assert ModelCard.load("me/organ-without-base").data.license is None


# ------------------------------------------------------------------------------------------------- several organs

MIT, APACHE, HOUSE = License("mit"), License("apache-2.0"), License("other", "house-rules", "https://a/b")
BOTH = License(["other", "mit"], "house-rules", "https://a/b")


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([MIT], MIT),
        ([HOUSE, HOUSE], HOUSE),
        ([MIT, APACHE, MIT], License(["mit", "apache-2.0"])),
        ([License(["mit", "cc0-1.0"]), MIT], License(["mit", "cc0-1.0"])),
        ([HOUSE, License("other")], License("other")),
        ([HOUSE, License("other", "gemma", "https://c/d")], License("other", "house-rules-and-gemma")),
        ([HOUSE, License("other", "house-rules", "https://c/d")], HOUSE),
        ([HOUSE, MIT], BOTH),
        ([BOTH, MIT, HOUSE], BOTH),
        ([License("other"), MIT], License(["other", "mit"])),
        ([MIT, License()], License()),
        ([License(), License()], License()),
    ],
)
def test_joint_licence(parts, expected):
    assert joint_license(parts) == expected


def test_a_composition_states_the_licences_of_its_organs(base_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    for name, license in (("one", "mit"), ("two", "cc0-1.0")):
        donor = DonorModel.from_base(base_folder("llama"), layers=(1, 3), license=license)
        model = TransplantedForCausalLM.from_pretrained(model, donor, donor_name=name)
    model.save_pretrained(tmp_path)
    for data in (DonorConfig.from_pretrained(tmp_path), ModelCard.load(tmp_path / "README.md").data):
        assert data.license == ["mit", "cc0-1.0"]
