"""What the Hub's client raises when the Hub cannot be reached is no `OSError`; here it becomes one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, HTTPError


@contextlib.contextmanager
def reaching_hub(what: str) -> Iterator[None]:
    """Turn a failure to reach the Hub in the block into a `ConnectionError`; its answers stay as they are.

    Args:
        what: What could not be done, for the error.
    """
    try:
        yield
    except HfHubHTTPError:  # an answer, and an OSError
        raise
    except HTTPError as error:
        raise ConnectionError(f"{what}, the Hub cannot be reached: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind, if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
