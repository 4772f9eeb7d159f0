"""Saving into a folder is whole or not at all, whatever lies there and wherever it breaks off."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from not_hf import NotHFError, TransplantedForCausalLM
from not_hf.hub.atomic_write import DRAFT, replacing
from testing import tree
from testing.donors import holds, organ, with_organs

T = TransplantedForCausalLM.from_pretrained


SHARDED = {"max_shard_size": "8KB"}


SINGLE: dict = {}


@pytest.fixture(scope="module")
def base(base_repo: Callable[[str], str]) -> str:
    return base_repo("llama")


@pytest.mark.slow
def test_a_variant_replaces_its_own_weights_only(base, tmp_path):
    first, second, third = (organ(base, seed) for seed in (1, 2, 3))
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, variant="fp16")
    third.save_pretrained(tmp_path, variant="fp16", **SHARDED)
    assert holds(tmp_path, first) and holds(tmp_path, third, variant="fp16")
    second.save_pretrained(tmp_path, variant="fp16")
    assert holds(tmp_path, first) and holds(tmp_path, second, variant="fp16")
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors", "model.fp16.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("existed", [False, True])
def test_a_save_that_fails_midway_changes_nothing(base, existed, tmp_path, monkeypatch):
    """The disk is full when the second organ of a composition is written."""
    folder, first = tmp_path / "deep" / "donor", with_organs(base, 1, 2)
    if existed:
        first.save_pretrained(folder)
    before = tree(folder)
    saved = []

    def full(tensors: dict, path: str, **kwargs: object) -> None:
        if saved:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        saved.append(save_file(tensors, path, **kwargs))

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        with_organs(base, 1, 2).save_pretrained(folder)
    assert tree(folder) == before
    assert folder.exists() == existed


def every_third_first(count: int) -> list:
    """Numbers from 0, of which `make test-fast` tries a third."""
    return [n if n % 3 == 0 else pytest.param(n, marks=pytest.mark.slow) for n in range(count)]


@pytest.mark.parametrize("options", [SINGLE, SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("nth", every_third_first(12))
def test_a_save_that_breaks_off_while_files_take_their_places_changes_nothing(
    base, nth, options, tmp_path, monkeypatch
):
    """Ctrl-C at any of the moves: never the config of one organ beside the weights of another."""
    first, second = organ(base, 1), organ(base, 2)
    first.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    replace, moves = os.replace, itertools.count()

    def interrupted(source, target) -> None:
        if next(moves) == nth:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("not_hf.hub.atomic_write.os.replace", interrupted)
    try:
        second.save_pretrained(tmp_path, **options)
    except KeyboardInterrupt:
        assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before
    else:
        assert nth >= 6 and holds(tmp_path, second)  # three files aside, three in place: it was through before
    assert not list(tmp_path.glob(f"{DRAFT}*"))


@pytest.mark.parametrize("nth", every_third_first(6))
def test_a_save_whose_undo_breaks_off_too_keeps_the_old_files_for_the_next_save(base, nth, tmp_path, monkeypatch):
    """Ctrl-C twice: once while files are moved, and again while they are moved back."""
    organ(base, 1).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    replace, moves = os.replace, itertools.count()

    def interrupted(source, target) -> None:
        if next(moves) in (nth, nth + 1):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("not_hf.hub.atomic_write.os.replace", interrupted)
        organ(base, 2).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="full"), replacing(tmp_path):
        raise OSError("full")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("nth", every_third_first(9))
def test_a_composition_that_breaks_off_leaves_no_folder(base, nth, tmp_path, monkeypatch):
    replace, moves = os.replace, itertools.count()

    def full(source, target) -> None:
        if next(moves) == nth:
            raise OSError(28, "No space left on device")
        replace(source, target)

    organ(base, 1).save_pretrained(tmp_path)
    before, several = sorted(tmp_path.rglob("*")), with_organs(base, 1, 2)
    monkeypatch.setattr("not_hf.hub.atomic_write.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        several.save_pretrained(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and holds(tmp_path, organ(base, 1))


def test_a_file_in_the_way_is_refused_and_changes_nothing(base, tmp_path):
    first, several = organ(base, 1), with_organs(base, 1, 2)
    first.save_pretrained(tmp_path)
    (tmp_path / "organ2").write_text("mine")
    with pytest.raises(NotHFError, match="organ2 is a file, where a folder is to be written"):
        several.save_pretrained(tmp_path)
    assert holds(tmp_path, first) and (tmp_path / "organ2").read_text() == "mine"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(NotHFError, match=r"model\.safetensors is a folder, where a file is to be written"):
        first.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_dir()
