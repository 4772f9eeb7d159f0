"""The errors not_hf raises. Each is also a `ValueError`, so `except ValueError` catches them all."""

from collections.abc import Sequence


class NotHFError(ValueError):
    """Base class of every error that not_hf raises on purpose."""


class IncompatibleDonorError(NotHFError):
    """A donor does not fit the recipient, the position or the organs already there."""


class UnsupportedArchitectureError(NotHFError):
    """A model is built in a way that its layers cannot be cut out, put in or merged."""


class CorruptDonorError(NotHFError):
    """A donor's files or config contradict themselves or cannot be read."""


def some(problems: Sequence[str]) -> str:
    """The first few of a list of problems, in one line."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more
