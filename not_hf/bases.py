"""The base that a donor's config names: what to say when it is not to be had."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


@contextlib.contextmanager
def reading_base(base: str, donor: str | None) -> Iterator[None]:
    """Say of a base that cannot be read in the block who named it, and how to name another copy.

    Args:
        base: Folder or Hub ID.
        donor: The donor that names it; `None` when the user did, who needs no telling.

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
        reason = " ".join(str(error).split())
        raise OSError(
            f"{donor} names {base} as its base, which cannot be read: {reason} – to use a copy of your own, name it: "
            f"TransplantedForCausalLM.from_pretrained(base, {donor!r}), AutoTokenizer.from_pretrained(base)"
        ) from error


def _require_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OSError("it was a folder, and there is none of that name here") from error
