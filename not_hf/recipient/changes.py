"""Changes of a model, each of them whole or undone, and forward passes that notice those of another thread."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from not_hf.errors import NotHFError


class Changes:
    """Makes the changes of one model, a thread at a time.

    A change that fails, or that Ctrl-C interrupts, is undone at once; if that is interrupted too, `repair` does it,
    which each use of the model's organs calls first. `make` takes functions, because a context manager written as a
    generator would leave undoing to the garbage collector if Ctrl-C came between the block and the generator.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held while a change is made
        self._undo: list[Callable[[], None]] = []  # of the changes being made, the outermost first
        self._broken: int | None = None  # the changes from this one on are to be undone
        self._made: Counter[int] = Counter()  # number of changes by thread

    def __reduce__(self) -> tuple[type[Changes], tuple[()]]:
        """Copy and pickle it as a new one."""
        return Changes, ()

    def make(self, change: Callable[[], None], undo: Callable[[], None]) -> None:
        """Make a change, or raise what it raised, with everything as before.

        Args:
            change: Makes the change; may make others within.
            undo: Restores the state from before. It may be called before the change began, and twice.
        """
        with self.lock:
            level = len(self._undo)
            try:
                self._undo.append(undo)
                self._made[threading.get_ident()] += 1
                change()
                del self._undo[level:]
            except BaseException:
                self._broken = level
                self.repair()
                raise

    def repair(self) -> None:
        """Undo a change whose undoing was interrupted."""
        if self._broken is None:
            return
        with self.lock:
            while self._broken is not None and len(self._undo) > self._broken:
                self._undo[-1]()
                self._undo.pop()
            self._broken = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Wait for a change in progress, and raise if another thread makes one before the block ends.

        Raises:
            NotHFError: Another thread has made a change, so what the block has computed belongs to no state.
        """
        before = self._made_elsewhere()
        try:
            yield
        except Exception as error:
            self._require_unchanged(before, error)
            raise
        self._require_unchanged(before)

    def _made_elsewhere(self) -> int:
        with self.lock:
            return self._made.total() - self._made[threading.get_ident()]

    def _require_unchanged(self, before: int, error: Exception | None = None) -> None:
        if self._made_elsewhere() != before:
            raise NotHFError(
                "another thread changed the organs of this model during the call; "
                "hold a lock around each change and each call, or give each thread a copy of the model"
            ) from error
