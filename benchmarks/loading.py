"""The part of `runtime.py` about loading: seconds in one process, peak memory in processes of their own."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from apart import memory, reset_peak, run_apart

TWINS = ("twins kept", "no twins kept")


class Folders(NamedTuple):
    """A base, an organ of it, and the native model that they make."""

    base: Path
    organ: Path
    native: Path


def load(model: Folders, dtype_name: str, repeats: int) -> dict[str, float]:
    """Time to load, and until the first forward pass is done, and what the organ adds; medians over paired rounds."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from not_hf import TransplantedForCausalLM
    from not_hf.architecture.twin import _twins

    dtype = getattr(torch, dtype_name)
    native, ours = AutoModelForCausalLM.from_pretrained, TransplantedForCausalLM.from_pretrained

    def load_anew() -> Any:
        _twins.clear()
        return ours(model.base, model.organ, dtype=dtype)

    def read() -> None:
        for tensor in load_file(model.organ / "model.safetensors").values():
            torch.aminmax(tensor.to(dtype))

    ways = {
        "native": lambda: native(model.native, dtype=dtype),
        "base": lambda: native(model.base, dtype=dtype),
        "twins kept": lambda: ours(model.base, model.organ, dtype=dtype),
        "no twins kept": load_anew,
        "read": read,
    }
    rounds = []
    for turn in range(repeats + 1):
        seconds = {way: load_and_run(ways[way]) for way in (ways if turn % 2 else reversed(ways))}
        if turn:  # the first one warms up
            rounds.append(seconds)
    loads, whole = ({way: [each[way][n] for each in rounds] for way in ways} for n in (0, 1))
    found = {f"load_seconds, {way}": statistics.median(loads[way]) for way in ways}
    for twins in TWINS:
        extra = zip(loads[twins], loads["base"], loads["read"], strict=True)
        found[f"organ_ms, {twins}"] = 1e3 * statistics.median(ours - base - read for ours, base, read in extra)
        found[f"per_native, {twins}"] = paired(whole[twins], whole["native"])
    return {**found, **{f"forward_seconds, {way}": statistics.median(whole[way]) for way in ("native", *TWINS)}}


def load_and_run(load: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until something is loaded, and until the first forward pass is done if that is a model."""
    import torch

    gc.collect()  # of the model before
    start = time.perf_counter()
    model = load()
    loaded = time.perf_counter() - start
    if model is None:
        return loaded, loaded
    with torch.no_grad():
        model(torch.arange(8)[None])  # (batch=1, seq=8)
    return loaded, time.perf_counter() - start


def load_memory(model: Folders, tiny: Folders, dtype: str, repeats: int) -> dict[str, float]:
    """Bytes of weights and peak memory of the three ways, each in fresh processes, turn and turn about."""
    ways: dict[str, list[dict[str, float]]] = {"base": [], "native": [], "transplanted": []}
    for _ in range(repeats):
        for way, runs in ways.items():
            runs.append(run_apart(measure_memory, way, dtype, model, tiny))
    growth, size = (
        {way: statistics.median(run[key] for run in runs) for way, runs in ways.items()}
        for key in ("memory_growth", "bytes")
    )
    return {
        **{f"{way}_memory_growth": value for way, value in growth.items()},
        **{f"{way}_bytes": value for way, value in size.items()},
        "memory_ratio": growth["transplanted"] / (growth["base"] + size["transplanted"] - size["base"]),
    }


def measure_memory(way: str, dtype: str, model: Folders, tiny: Folders, warm: Callable[[], None]) -> dict[str, float]:
    """Load a tiny model, then the real one, and read its weights. Sizes in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from not_hf import TransplantedForCausalLM

    def loaded(base: Path, organ: Path, native: Path) -> Any:
        if way == "transplanted":
            return TransplantedForCausalLM.from_pretrained(base, organ, dtype=getattr(torch, dtype))
        return AutoModelForCausalLM.from_pretrained(base if way == "base" else native, dtype=getattr(torch, dtype))

    loaded(*tiny)
    warm()
    before = reset_peak()
    parameters = list(loaded(*model).parameters())
    for parameter in parameters:
        torch.aminmax(parameter)
    return {
        "memory_growth": memory("VmHWM") - before,
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    }


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of neighbouring turns."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
