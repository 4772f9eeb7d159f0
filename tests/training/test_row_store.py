"""Tensors kept on disk by key: whole or not at all, whoever else writes there, whatever happens to the files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from not_hf.training.row_store import RowStore
from testing.processes import forked

SHAPE = (5, 8)


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def row(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(n)).to(dtype)


def written(folder: Path, count: int, max_bytes: int = 10**6) -> RowStore:
    store = RowStore(folder, max_bytes)
    for n in range(count):
        store.write(key(n), row(n))
    return store


def found(folder: Path, count: int) -> list[bool]:
    """Which rows another process would find; what it finds must be right."""
    store = RowStore(folder, 10**6)
    rows = [store.read(key(n), SHAPE, torch.float32) for n in range(count)]
    assert all(each is None or torch.equal(each, row(n)) for n, each in enumerate(rows))
    return [each is not None for each in rows]


@pytest.mark.parametrize("length", [5, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_by_this_and_the_next_store(dtype, length, tmp_path):
    store, given = RowStore(tmp_path / "a", 10**6), row(1, dtype)[:length]
    store.write(key(1), given)
    for each in (store, RowStore(tmp_path / "a", 10**6)):
        assert torch.equal(each.read(key(1), given.shape, dtype), given)
        assert each.read(key(2), SHAPE, dtype) is None
        assert (each.hits, each.misses) == (1, 1)


def test_a_row_of_another_shape_is_not_found(tmp_path):
    assert written(tmp_path / "a", 1).read(key(0), (4, 8), torch.float32) is None


def test_files_cut_short_anywhere_lose_the_rows_behind_and_no_others(tmp_path):
    """As a process leaves them that is killed between any two bytes."""
    written(tmp_path / "a", 4)
    size = row(0).nbytes
    (rows,), (index,) = (tmp_path / "a").glob("*.rows"), (tmp_path / "a").glob("*.index")
    record = index.stat().st_size // 4
    os.truncate(index, 3 * record + record // 2)
    assert found(tmp_path / "a", 4) == [True, True, True, False]
    os.truncate(rows, 2 * size - 1)
    assert found(tmp_path / "a", 4) == [True, False, False, False]
    rows.unlink()
    assert found(tmp_path / "a", 4) == [False] * 4


def test_a_damaged_row_is_not_found_and_can_be_written_again(tmp_path):
    written(tmp_path / "a", 3)
    (rows,) = (tmp_path / "a").glob("*.rows")
    data = bytearray(rows.read_bytes())
    data[row(0).nbytes + 7] ^= 1
    rows.write_bytes(data)
    assert found(tmp_path / "a", 3) == [True, False, True]
    store = RowStore(tmp_path / "a", 10**6)
    assert store.read(key(1), SHAPE, torch.float32) is None
    store.write(key(1), row(1))
    assert torch.equal(store.read(key(1), SHAPE, torch.float32), row(1))


def test_nothing_is_added_past_the_size(tmp_path):
    store = written(tmp_path / "a", 5, max_bytes=3 * row(0).nbytes + 60)
    assert len(store) == 3
    assert sum(file.stat().st_size for file in (tmp_path / "a").glob("*.rows")) == 3 * row(0).nbytes
    assert len(written(tmp_path / "b", 5, max_bytes=0)) == 0


def test_stores_unused_for_longest_make_room(tmp_path):
    for age, name in ((300, "old"), (200, "middle"), (100, "new")):
        written(tmp_path / name, 2)
        stamp = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (stamp, stamp))
    held = sum(file.stat().st_size for file in (tmp_path / "old").iterdir())
    RowStore(tmp_path / "old", 2 * held)  # used now, so `middle` is the oldest
    assert sorted(each.name for each in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.slow
def test_several_processes_write_into_one_store(tmp_path):
    def write(start: int) -> None:
        store = RowStore(tmp_path / "a", 10**7)
        for n in range(start, 60, 2):
            store.write(key(n), row(n))
        os.kill(os.getpid(), signal.SIGKILL)

    writers = [forked(write, start) for start in range(2)]
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [-9, -9]
    assert found(tmp_path / "a", 60) == [True] * 60


def test_a_full_disk_stops_the_writing_and_nothing_else(tmp_path, caplog):
    store = written(tmp_path / "a", 2)
    store._segment = (open("/dev/full", "r+b", buffering=0), store._segment[1])  # noqa: SIM115
    store.write(key(7), row(7))
    assert "no more rows are stored in" in caplog.text and key(7) not in store
    assert torch.equal(store.read(key(1), SHAPE, torch.float32), row(1))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_pipes_and_links_named_as_rows_are_left_alone(tmp_path):
    written(tmp_path / "a", 2)
    (rows,) = (tmp_path / "a").glob("*.rows")
    for suffix in (".rows", ".index"):
        other = {".rows": ".index", ".index": ".rows"}[suffix]
        os.mkfifo(tmp_path / "a" / f"x{suffix}")  # whoever opens it waits for another process
        (tmp_path / "a" / f"x{other}").write_bytes(b"")
        (tmp_path / "a" / f"link{suffix}").symlink_to(rows.with_suffix(suffix))
        assert found(tmp_path / "a", 2) == [True, True]
        for each in ("x.rows", "x.index"):
            (tmp_path / "a" / each).unlink()


def test_rows_are_read_without_a_position_that_forked_processes_share(tmp_path):
    store = written(tmp_path / "a", 3)
    file = store._locations[key(2)].file
    file.seek(5)
    assert torch.equal(store.read(key(2), SHAPE, torch.float32), row(2))
    assert file.tell() == 5
