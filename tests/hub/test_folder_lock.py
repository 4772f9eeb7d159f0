"""Two saves into one folder follow each other; what a killed save left there goes with the next one."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from not_hf import DonorModel, NotHFError
from not_hf.hub import folder_lock
from not_hf.hub.atomic_write import DRAFT, replacing
from not_hf.hub.folder_lock import locked, may_be_locked
from testing.donors import holds, organ, with_organs
from testing.processes import forked


@pytest.fixture(scope="module")
def base(base_folder: Callable[[str], Path]) -> str:
    return str(base_folder("llama"))


@pytest.fixture
def waiting(monkeypatch) -> threading.Event:
    """Set when a save waits for another one."""
    event = threading.Event()
    monkeypatch.setattr(folder_lock.logger, "warning", lambda *args: event.set())
    return event


@pytest.mark.parametrize("of", ["folder", "file"])
def test_a_second_save_waits_for_the_first(of, base, tmp_path, waiting, monkeypatch):
    """The first one has its weights in place and not yet its config when the second one begins."""
    if of == "file":  # as on Windows
        monkeypatch.setattr(folder_lock, "fcntl", None)
    first, second = organ(base, 1), organ(base, 2)
    second.config.position = 0
    first.save_pretrained(tmp_path)
    replace, threads = os.replace, [threading.Thread(target=second.save_pretrained, args=(tmp_path,))]

    def slow(source, target) -> None:
        if threads and Path(target) == tmp_path / "config.json":
            started.append(threads.pop())
            started[0].start()
            assert waiting.wait(20)
        replace(source, target)

    started: list[threading.Thread] = []
    monkeypatch.setattr("not_hf.hub.atomic_write.os.replace", slow)
    first.save_pretrained(tmp_path)
    started[0].join(20)
    assert not started[0].is_alive()
    assert holds(tmp_path, second) and DonorModel.from_pretrained(tmp_path, verify=True).config.position == 0


@pytest.mark.slow
def test_processes_that_save_to_one_folder_leave_one_of_their_saves(base, tmp_path):
    def save_often(source: Path) -> None:
        donor = DonorModel.from_pretrained(source)
        for _ in range(20):
            donor.save_pretrained(tmp_path / "f")

    donors = [organ(base, seed) for seed in (1, 2)]
    for n, donor in enumerate(donors):
        donor.config.position = n
        donor.save_pretrained(tmp_path / f"{n}")
    writers = [forked(save_often, tmp_path / f"{n}") for n in (0, 1)]
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = DonorModel.from_pretrained(tmp_path / "f", verify=True)
    assert holds(tmp_path / "f", donors[found.config.position])


def test_a_folder_that_a_failed_save_removed_is_made_again(tmp_path, waiting):
    folder, got = tmp_path / "donor", []

    def save() -> None:
        with replacing(folder) as draft:
            Path(draft, "file").write_text("second")
        got.append(True)

    second = threading.Thread(target=save)
    with pytest.raises(OSError, match="full"), replacing(folder):
        second.start()
        assert waiting.wait(20)
        raise OSError("full")
    second.join(20)
    assert got and (folder / "file").read_text() == "second"


def test_a_folder_that_cannot_be_locked_is_saved_to_with_a_warning(base, tmp_path, monkeypatch, caplog):
    def flock(*args: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    (tmp_path / f"{DRAFT}12345678").mkdir()
    organ(base, 1).save_pretrained(tmp_path)
    assert holds(tmp_path, organ(base, 1))
    assert "let only one program at a time save there" in caplog.text
    assert (tmp_path / f"{DRAFT}12345678").exists()  # it may be of a save that is under way


def test_a_lock_can_be_asked_about(tmp_path):
    assert not may_be_locked(tmp_path) and not may_be_locked(tmp_path / "missing")
    with locked(tmp_path):
        assert may_be_locked(tmp_path)
    assert not may_be_locked(tmp_path)


@pytest.mark.parametrize("several", [False, True], ids=["donor", "composition"])
def test_processes_that_write_nothing_do_not_wait(several, base, tmp_path):
    """The main process may need them while it saves."""
    model = with_organs(base, 1, 2) if several else organ(base, 1)
    with locked(tmp_path):
        model.save_pretrained(tmp_path, is_main_process=False)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def half_saved(base, tmp_path_factory) -> Path:
    """Organ 1 and a card with words of its owner; saving it again was killed before the new config arrived."""
    folder = tmp_path_factory.mktemp("killed")

    def save_and_be_killed(replace: Callable[[str, str], None] = os.replace) -> None:
        def killed(source: str, target: str) -> None:
            if str(target) == str(folder / "config.json"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        donor = DonorModel.from_pretrained(folder)
        os.replace = killed
        donor.save_pretrained(folder)

    organ(base, 1).save_pretrained(folder)
    with (folder / "README.md").open("a") as card:
        card.write("\nIts owner's words.\n")
    process = forked(save_and_be_killed)
    process.join(120)
    assert process.exitcode == -9
    assert len(list(folder.glob(f"{DRAFT}*"))) == 2  # the new files, and the old ones
    return folder


@pytest.fixture
def killed(half_saved, tmp_path) -> Path:
    return shutil.copytree(half_saved, tmp_path / "donor")


@pytest.mark.slow
def test_the_next_save_removes_what_killed_saves_left(base, killed, caplog):
    (killed / "_drafts").mkdir()  # somebody's own
    organ(base, 2).save_pretrained(killed)
    assert holds(killed, organ(base, 2))
    assert "Its owner's words." in (killed / "README.md").read_text()
    assert not list(killed.glob(f"{DRAFT}*")) and (killed / "_drafts").exists()
    assert not [
        record for record in caplog.records if record.name == folder_lock.__name__
    ]  # nobody waits for the dead


def test_a_save_that_fails_puts_back_what_a_killed_save_was_replacing(base, killed):
    with pytest.raises(OSError, match="full"), replacing(killed):
        raise OSError("full")
    assert holds(killed, organ(base, 1)) and "Its owner's words." in (killed / "README.md").read_text()


def test_a_save_that_was_killed_at_its_end_is_kept(base, killed):
    (draft,) = (
        folder
        for folder in killed.glob(f"{DRAFT}*")
        if (folder / "config.json").exists() and "replaced" not in folder.name
    )
    os.replace(draft / "config.json", killed / "config.json")
    (killed / "README.md").write_text("new")
    with pytest.raises(OSError, match="full"), replacing(killed):
        raise OSError("full")
    assert (killed / "README.md").read_text() == "new" and not list(killed.glob(f"{DRAFT}*"))


def test_a_composition_does_not_write_through_a_link(base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "composition"
    model = with_organs(base, 1, 2)
    model.save_pretrained(folder)
    shutil.rmtree(folder / "organ2")
    (folder / "organ2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotHFError, match="organ2 is a link, and its target would be written to; remove it"):
        model.save_pretrained(folder)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_link_to_the_folder_itself_is_followed(base, tmp_path, caplog):
    """People link to a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "donor").symlink_to(tmp_path / "disk")
    caplog.set_level(logging.WARNING)
    organ(base, 1).save_pretrained(tmp_path / "donor")
    assert holds(tmp_path / "disk", organ(base, 1))
