"""Ctrl-C at any step of a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# What changes live models. Elsewhere in the package, an interrupt at the last step of torch's own context managers
# (`torch.device`) would leave them open, as anywhere in Python.
CHANGING = tuple(
    f"/not_hf/recipient/{name}.py" for name in ("changes", "mixin", "modeling", "organ", "surgery", "without_donors")
)
SAVING = ("/not_hf/hub/atomic_write.py", "/not_hf/hub/folder_lock.py")


def interrupted(
    call: Callable[[], Any], at: int | None = None, opcodes: bool = False, files: tuple[str, ...] = CHANGING
) -> int:
    """Make a call, in which `KeyboardInterrupt` is raised at one step of the code in some files.

    Args:
        call: What to call; the interrupt ends it and is not passed on.
        at: Number of the step; `None` or beyond the last one: there is none.
        opcodes: Whether a step is a bytecode instruction, instead of a line.
        files: Ends of the names of the files whose steps count.

    Returns:
        The number of steps that were made.
    """
    steps = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal steps
        if not frame.f_code.co_filename.endswith(files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = opcodes, not opcodes
        if event in ("call", "line", "opcode"):
            if steps == at:
                sys.settrace(None)
                raise KeyboardInterrupt
            steps += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return steps
