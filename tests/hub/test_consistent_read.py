"""A reader beside a writer sees the donor of before or that of after, or a refusal; never a mixture."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModel

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM
from not_hf.hub import consistent_read
from testing import tree
from testing.donors import holds, organ, same, with_organs

T = TransplantedForCausalLM.from_pretrained
SHARDED = {"max_shard_size": "8KB"}


@pytest.fixture(scope="module")
def base(base_folder: Callable[[str], Path]) -> str:
    return str(base_folder("llama"))


@pytest.fixture
def no_pauses(monkeypatch) -> None:
    monkeypatch.setattr(consistent_read, "_PAUSES", (0, 0))


def domains(base: str, folder: Path) -> str:
    """The domain in the config that a load finds; its weights must be those of that domain."""
    donor = DonorModel.from_pretrained(folder)
    assert same(donor, organ(base, int(donor.config.domain)))
    return donor.config.domain


def numbered(base: str, seed: int) -> DonorModel:
    donor = organ(base, seed)
    donor.config.domain, donor.config.position = str(seed), seed
    return donor


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("read", [DonorModel.from_pretrained, AutoModel.from_pretrained], ids=["donor", "auto"])
def test_a_load_between_any_two_moves_is_whole_or_refused(read, options, base, tmp_path, monkeypatch, no_pauses):
    old, new = numbered(base, 1), numbered(base, 2)
    old.save_pretrained(tmp_path)
    replace, seen = os.replace, []

    def observed(source, target) -> None:
        replace(source, target)
        try:
            found = read(tmp_path)
        except (ValueError, OSError):  # without a config, the Auto class raises a ValueError of its own
            seen.append(None)
        else:
            seen.append(found.config.domain)
            assert same(found, {"1": old, "2": new}[found.config.domain])

    monkeypatch.setattr("not_hf.hub.atomic_write.os.replace", observed)
    new.save_pretrained(tmp_path, **options)
    monkeypatch.undo()
    assert None in seen and seen[-1] == "2" and holds(tmp_path, new)


def save_before(monkeypatch, name: str, save: Callable[[], None], nth: int = 0) -> None:
    """Save just before the nth call of a function of not_hf."""
    module, _, attribute = name.rpartition(".")
    function = getattr(__import__(module, fromlist=[attribute]), attribute)
    calls = itertools.count()

    def interposed(*args, **kwargs):
        if next(calls) == nth:
            save()
        return function(*args, **kwargs)

    monkeypatch.setattr(name, interposed)


@pytest.mark.parametrize("name", ["open_checkpoint", "require_same_save", "tensor_problems"])
def test_a_donor_that_is_saved_again_while_it_is_read_is_read_again(name, base, tmp_path, monkeypatch, no_pauses):
    numbered(base, 1).save_pretrained(tmp_path)
    new = numbered(base, 2)
    save_before(monkeypatch, f"not_hf.donor.loading.{name}", lambda: new.save_pretrained(tmp_path))
    found = DonorModel.from_pretrained(tmp_path)
    assert found.config.domain == "2" and same(found, new)


@pytest.mark.parametrize("how", ["from_pretrained", "load_donor", "hotswap_donor"])
def test_so_is_one_that_is_transplanted(how, base, tmp_path, monkeypatch, no_pauses):
    numbered(base, 1).save_pretrained(tmp_path)
    new = numbered(base, 2)
    model = T(base, numbered(base, 3), donor_name="a")
    save_before(monkeypatch, "not_hf.donor.loading.open_checkpoint", lambda: new.save_pretrained(tmp_path))
    if how == "from_pretrained":
        model = T(base, tmp_path, donor_name="a")
    elif how == "load_donor":
        model.load_donor(tmp_path, "b")
        model.delete_donor("a")
    else:
        model.hotswap_donor("a", tmp_path)
    (config,) = model.donor_config.values()
    assert config.domain == "2"
    model.save_pretrained(tmp_path / "again")
    assert same(DonorModel.from_pretrained(tmp_path / "again"), new)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [0, 1])
def test_a_composition_that_is_saved_again_while_it_is_read_is_read_again(nth, base, tmp_path, monkeypatch, no_pauses):
    model = with_organs(base, 1, 2)
    model.save_pretrained(tmp_path)
    other = T(base, organ(base, 3), donor_name="organ1", position=0)
    other.load_donor(organ(base, 4), "organ2", position=0)
    save_before(monkeypatch, "not_hf.composition.resolve._resolve_entry", lambda: other.save_pretrained(tmp_path), nth)
    found = T(tmp_path)
    assert same(found, other) and [config.position for config in found.donor_config.values()] == [0, 0]


def test_a_config_of_an_earlier_save_is_refused(base, tmp_path, no_pauses):
    numbered(base, 1).save_pretrained(tmp_path)
    config = DonorModel.from_pretrained(tmp_path).config
    read = type(config).from_pretrained(tmp_path)
    numbered(base, 2).save_pretrained(tmp_path)
    with pytest.raises(NotHFError, match="was saved again while it was read; load it again"):
        DonorModel.from_pretrained(tmp_path, config=read)
    assert DonorModel.from_pretrained(tmp_path, config=config).config.domain == "1"  # the caller's own choice


def test_reading_writes_nothing_and_needs_no_digest(base, tmp_path):
    donor = numbered(base, 1)
    donor.save_pretrained(tmp_path / "donor")
    values = json.loads((tmp_path / "donor" / "config.json").read_text())
    del values["digests"]  # as earlier versions saved it
    (tmp_path / "donor" / "config.json").write_text(json.dumps(values))
    for path in (tmp_path / "donor", *(tmp_path / "donor").iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(tmp_path)
    try:
        assert holds(tmp_path / "donor", donor)
        assert T(base, tmp_path / "donor").active_donors == ["default"]
    finally:
        (tmp_path / "donor").chmod(0o755)
    assert tree(tmp_path) == before


def test_what_is_wrong_with_a_donor_is_said_at_once(base, tmp_path, monkeypatch):
    """Only a save is a reason to read again."""
    organ(base, 1).save_pretrained(tmp_path)
    shutil.copyfile(tmp_path / "README.md", tmp_path / "model.safetensors")
    monkeypatch.setattr(consistent_read.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(NotHFError, match="not a whole safetensors file"):
        DonorModel.from_pretrained(tmp_path)
