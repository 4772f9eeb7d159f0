"""The folder of prefix stores: room is made by deleting what not_hf made there, and nothing else."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from not_hf import NotHFError
from not_hf.training.prefix_folder import MARKER, make_room, make_store, require_only_stores
from not_hf.training.row_store import RowStore

NAMES = [f"{n:032x}" for n in range(4)]


def store(folder: Path, age: int = 0) -> Path:
    """A store of one row, last used so many seconds ago."""
    RowStore(folder, 10**6).write(b"k" * 32, torch.ones(100))
    stamp = folder.stat().st_mtime - age
    os.utime(folder, (stamp, stamp))
    return folder


def held_by_others(folder: Path) -> list[Path]:
    """What people keep where a store is expected; each has the content, the name or the marker of one."""
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis/thesis.tex").write_text("five years of work")
    named = folder / NAMES[0]
    named.mkdir()
    (named / "1.jpg").write_bytes(b"x" * 1000)
    added = store(folder / NAMES[1])
    (added / "notes.txt").write_text("put here later")
    shutil.copytree(store(folder.parent / "elsewhere" / NAMES[2]), folder / "photos")
    (folder / "photos" / MARKER).unlink()
    (folder / NAMES[2]).symlink_to(folder.parent / "elsewhere" / NAMES[2])
    nested = store(folder / NAMES[3])
    (nested / f"{NAMES[0]}.rows").mkdir()
    return [folder / "thesis", named, added, folder / "photos", folder / NAMES[2], nested]


def files(folder: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in sorted(folder.rglob("*")) if each.is_file()}


def test_only_stores_make_room_the_oldest_first(tmp_path):
    others = held_by_others(tmp_path / "work")
    before = files(tmp_path / "work")
    old, unmarked = store(tmp_path / "work/old", age=300), store(tmp_path / "work" / ("a" * 32), age=200)
    (unmarked / MARKER).unlink()  # as earlier versions made them
    os.utime(unmarked, (old.stat().st_mtime + 100,) * 2)
    new = store(tmp_path / "work/new", age=100)
    make_store(tmp_path / "work/used")
    assert make_room(tmp_path / "work/used", 600) == sum(
        each.stat().st_size for each in new.iterdir() if each.name != MARKER
    )
    assert new.exists() and not old.exists() and not unmarked.exists()
    assert make_room(tmp_path / "work/used", 0) == 0
    assert not new.exists() and (tmp_path / "work/used").exists()
    shutil.rmtree(tmp_path / "work/used")
    assert files(tmp_path / "work") == before and all(os.path.lexists(each) for each in others)
    assert (tmp_path / "elsewhere" / NAMES[2]).exists()


def test_whatever_is_not_a_store_is_refused(tmp_path):
    for other in held_by_others(tmp_path / "work"):
        folder = tmp_path / f"only-{other.parent.name}-{other.name}"
        folder.mkdir()
        other.rename(folder / other.name)
        before = files(folder)
        with pytest.raises(NotHFError, match=rf"holds {other.name}, not made by .*choose an empty or new folder"):
            require_only_stores(folder)
        assert files(folder) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(NotHFError, match="is a file"):
        require_only_stores(tmp_path / "file")


def test_stores_of_any_version_are_taken_and_marked_when_used(tmp_path):
    require_only_stores(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    for name in NAMES:
        store(tmp_path / "work" / name)
    (tmp_path / "work" / NAMES[0] / MARKER).unlink()
    (tmp_path / "work" / NAMES[1] / MARKER).write_bytes(b"Signature: 8a47")  # as another process writes it
    (tmp_path / "work" / ("b" * 32)).mkdir()
    require_only_stores(tmp_path / "work")
    assert len(RowStore(tmp_path / "work" / NAMES[0], 10**6)) == 1
    assert (tmp_path / "work" / NAMES[0] / MARKER).read_text().startswith("Signature: 8a477f597d28d172")


def test_a_marker_with_other_words_is_somebody_else_s(tmp_path):
    """Others mark caches of theirs by a file of that name."""
    target = store(tmp_path / "work" / NAMES[0])
    (target / MARKER).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# This file was made by cargo.\n")
    with pytest.raises(NotHFError, match="not made by"):
        require_only_stores(tmp_path / "work")
    store(tmp_path / "work/own")
    make_room(tmp_path / "work/own", 0)
    assert target.exists()


@pytest.mark.slow
def test_many_may_make_room_at_once(tmp_path):
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(40):
                rows = RowStore(tmp_path / f"{number:016x}{n % 3:016x}", 1500)
                rows.write(n.to_bytes(32, "big"), torch.ones(100))
                require_only_stores(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
