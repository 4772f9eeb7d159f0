"""Saves that are killed, interrupted, or run out of disk: the folder holds the old donor, the new one, or says no."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from not_hf import DonorModel, NotHFError
from testing.donors import tiny_organ
from testing.interrupting import SAVING, interrupted

Save = Callable[[Path], None]


def two_donors() -> dict[str, DonorModel]:
    """They differ in config and weights, and the second is sharded when it is saved."""
    donors = {"old": tiny_organ(1), "new": tiny_organ(2)}
    donors["new"].config.position = 0
    return donors


def found_in(folder: Path, donors: dict[str, DonorModel]) -> str:
    """Which donor a folder holds, whole; `refused` if it does not load; `mixture` if it is none of them."""
    try:
        loaded = DonorModel.from_pretrained(folder, verify=True)
    except (NotHFError, OSError):
        return "refused"
    for name, donor in donors.items():
        tensors = donor.state_dict()
        if loaded.config.position == donor.config.position and all(
            tensor.equal(tensors[key]) for key, tensor in loaded.state_dict().items()
        ):
            return name
    return "mixture"


def save_new(donors: dict[str, DonorModel], folder: Path) -> None:
    """Save the second donor, in shards."""
    donors["new"].save_pretrained(folder, max_shard_size="20KB")


def kill_saves(times: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kill a process at a random moment while it saves one donor over another."""
    donors, found, chance = two_donors(), Counter[str](), random.Random(seed)
    save_new(donors, folder)  # what is imported late is there now
    for _ in range(times):
        donors["old"].save_pretrained(folder)
        start = time.perf_counter()
        if (child := os.fork()) == 0:
            disable_progress_bar()  # bars have a lock between processes, which a killed one would keep
            save_new(donors, folder)
            os._exit(0)
        time.sleep(chance.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert time.perf_counter() - start < 60
        found[found_in(folder, donors)] += 1
    return found


def fill_disk(times: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Save one donor over another where files cannot grow beyond a random size."""
    donors, found, chance = two_donors(), Counter[str](), random.Random(seed)
    for _ in range(times):
        donors["old"].save_pretrained(folder)
        if (child := os.fork()) == 0:
            disable_progress_bar()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing raises OSError instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit := chance.randrange(100, 30_000), limit))
            try:
                save_new(donors, folder)
            except OSError:
                os._exit(1)
            except BaseException:
                os._exit(2)
            os._exit(0)
        chance.random()  # the child has drawn from a copy
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcome = found_in(folder, donors)
        told = {0: "new", 1: "old"}.get(code, "another error")
        found[outcome if outcome == told else f"told {told}, found {outcome}"] += 1
    return found


def interrupt_saves(points: int | None, folder: Path) -> Counter[str]:
    """Press Ctrl-C at evenly spread steps, the last one among them, or at all, of a save over another donor."""
    donors, found = two_donors(), Counter[str]()
    donors["old"].save_pretrained(folder)
    steps = interrupted(lambda: save_new(donors, folder), files=SAVING)
    for step in range(steps - 1, -1, -1 if points is None else -max(1, steps // points)):
        donors["old"].save_pretrained(folder)
        interrupted(lambda: save_new(donors, folder), step, files=SAVING)
        found[found_in(folder, donors)] += 1
    return found
