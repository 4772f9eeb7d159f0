"""The errors not_hf raises. Each is also a `ValueError`, so `except ValueError` catches them all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

# huggingface_hub is imported where it is needed: `not-hf --help` comes past here, and is to be quick


class NotHFError(ValueError):
    """Base class of every error that not_hf raises on purpose."""


class IncompatibleDonorError(NotHFError):
    """A donor does not fit the recipient, the position or the organs already there."""


class UnsupportedArchitectureError(NotHFError):
    """A model is built in a way that its layers cannot be cut out, put in or merged."""


class CorruptDonorError(NotHFError):
    """A donor's files or config contradict themselves or cannot be read."""


def some(problems: Sequence[object]) -> str:
    """The first five problems of a list, in one line."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(map(str, problems[:5])) + more


@contextlib.contextmanager
def reaching_hub(what: str) -> Iterator[None]:
    """Turn a failure to reach the Hub into a `ConnectionError`; errors that the Hub answers with pass unchanged.

    Args:
        what: What could not be done, for the error.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError:  # an answer, and an OSError
        raise
    except HTTPError as error:
        raise ConnectionError(f"{what}, the Hub cannot be reached: {one_line(error)}") from error


def one_line(error: BaseException, limit: int | None = None) -> str:
    """What an error says, in one line of at most `limit` characters; its class, if it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


@contextlib.contextmanager
def reading_base(base: str, donor: str | None) -> Iterator[None]:
    """If the base cannot be read in the block, the error says which donor names it and how to use another copy.

    Args:
        base: Folder or Hub ID.
        donor: The donor that names it; `None` if the user did, and the error stays as it is.

    Raises:
        OSError: The base cannot be read.
    """
    try:
        if donor is not None and not os.path.isdir(base):
            _require_hub_id(base)
        yield
    except OSError as error:
        if donor is None:
            raise
        raise OSError(
            f"{donor} names {base} as its base, which cannot be read: {one_line(error)} – to use a copy of your own, "
            f"name it: TransplantedForCausalLM.from_pretrained(base, {donor!r}), AutoTokenizer.from_pretrained(base)"
        ) from error


def _require_hub_id(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OSError("it was a folder, and there is none of that name here") from error
