"""Loading, switching and unloading again and again: memory, file handles and hooks must stay as they are."""

from __future__ import annotations

import copy
import gc
import os
import resource
from pathlib import Path

from testing.donors import tiny_organ, transplanted_class
from testing.models import TOKEN_IDS, tiny_model


def held() -> dict[str, int]:
    """What the process holds: bytes of memory, open files, Python objects."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return {"bytes": pages * resource.getpagesize(), "files": files, "objects": len(gc.get_objects())}


def run_cycles(cycles: int, folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Run cycles on one model, and return what was held after the first tenth and at the end."""
    model, first = copy.deepcopy(tiny_model("llama")), {}
    names = [name for name, _ in model.named_parameters()]
    donors = [tiny_organ(seed) for seed in range(2)]
    donors[1].save_pretrained(folder)
    for n in range(cycles):
        model = transplanted_class(model).from_pretrained(model, donors[0], donor_name="a", position=n % 5)
        model.load_donor(folder if n % 10 == 0 else donors[1], "b", position=(n + 1) % 5)
        model.set_donor("b")
        model.set_donor_scale("b", 0.5)
        with model.disable_donors():
            model.set_donor(["a", "b"])
        if n % 10 == 0:
            model(TOKEN_IDS, output_hidden_states=True)
        model = model.unload()
        if n == cycles // 10:
            first = held()
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks and [name for name, _ in model.named_parameters()] == names
    return first, held()
