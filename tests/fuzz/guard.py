"""Watch one input: how it ends, how long it takes, what memory it needs, what it writes and whether it runs code."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 2  # of the processor
BYTES = 2**30  # above what the process had before
_HANG = 30  # seconds until an input that does not end is interrupted

# Audit events of code that reaches out of the process
_FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("subprocess.Popen", "pty.spawn", "ctypes.dlopen", "socket.connect", "socket.getaddrinfo", "socket.bind"),
)
# Forbidden outside of the scratch folder: which arguments are paths, and which is the folder that they count from
_CHANGES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "os.mkdir": ((0,), 2),
    "os.remove": ((0,), 1),
    "os.rmdir": ((0,), 1),
    "os.chmod": ((0,), 2),
    "os.rename": ((0, 1), 2),
    "os.link": ((1,), 2),
    "os.symlink": ((1,), 2),
    "os.truncate": ((0,), None),
}


class _Hang(BaseException):
    """An input did not end."""


class Guard:
    """Runs inputs, each in a scratch folder, and says what is wrong with how they ended.

    An audit hook cannot be removed: it stays for the life of the process, and does nothing between inputs.

    Args:
        scratch: The only folder that may be written to.
        runs_code: Whether modules may be imported and code compiled, as transformers does for a new architecture.
    """

    def __init__(self, scratch: Path, runs_code: bool) -> None:
        self.scratch = os.path.realpath(scratch)
        self.runs_code = runs_code
        self.modules = _packages()
        self.events: list[str] | None = None
        sys.addaudithook(self._watch)

    def faults(self, run: Callable[[], Any]) -> tuple[str, list[str]]:
        """Run an input. Returns how it ended, and what is wrong with that."""
        self.events, before, start = [], _peak(), time.process_time()
        faults = []
        with _interrupted():
            try:
                run()
                end = "success"
            except (ValueError, OSError) as error:
                end = type(error).__name__
                if not str(error).strip():
                    faults.append(f"{end} without a message")
            except (Exception, _Hang) as error:
                end = type(error).__name__
                faults.append(f"{end}: {str(error)[:300]}")
        faults += sorted(set(self.events))
        self.events = None
        if (seconds := time.process_time() - start) > SECONDS:
            faults.append(f"took {seconds:.1f} s")
        if (grown := _peak() - before) > BYTES:
            faults.append(f"took {grown / 2**30:.1f} GiB")
        if foreign := _packages() - self.modules:
            faults.append(f"imported {', '.join(sorted(foreign))}")
            self.modules |= foreign
        return end, faults

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is None:
            return
        if event in _FORBIDDEN:
            self.events.append(f"{event} {arguments[:2]!r:.100}")
        elif event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else mode != "r"
            if writes and self._is_outside(path):
                self.events.append(f"writes {path!r:.100}")
        elif event in _CHANGES:
            paths, folder = _CHANGES[event]
            root = -1 if folder is None else arguments[folder]
            self.events += [f"{event} {arguments[n]!r:.100}" for n in paths if self._is_outside(arguments[n], root)]
        elif event in ("compile", "exec", "import") and not self.runs_code:
            self.events.append(f"{event} {arguments[0]!r:.100}")

    def _is_outside(self, path: Any, folder: int = -1) -> bool:
        if isinstance(path, int) or path in ("/dev/null", b"/dev/null"):  # a descriptor that is open already
            return False
        root = "" if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        return not os.path.realpath(os.path.join(root, os.fsdecode(path))).startswith(self.scratch + os.sep)


def _packages() -> set[str]:
    return {name.partition(".")[0] for name in list(sys.modules)}


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hang(f"no end after {_HANG} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _HANG)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
