"""The errors not_hf raises. Each is also a `ValueError`, so `except ValueError` catches them all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

# huggingface_hub is imported in functions: it is slow, and `not-hf --help` imports this module.

_FILES = (".bin", ".pt", ".pth")  # suffixes that names of repos do not have


# Control characters but line breaks and tabs, marks that reorder text, other line breaks, and halves of characters
_UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escape what a terminal does not show but obeys, as JSON escapes it: names and texts of a donor may hold it."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class NotHFError(ValueError):
    """Base class of the errors that not_hf raises.

    Examples:
        >>> from not_hf import compose
        >>> compose([])
        Traceback (most recent call last):
        not_hf.errors.NotHFError: compose needs at least one donor; give folders or Hub IDs: compose([donor, ...])
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class IncompatibleDonorError(NotHFError):
    """A donor does not fit the recipient, its position, or the organs in the model.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, TransplantedForCausalLM
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)), position=9)
        Traceback (most recent call last):
        not_hf.errors.IncompatibleDonorError: cannot insert 2 layers at position 9 of 4 (the recipient); ...
    """


class UnsupportedArchitectureError(NotHFError):
    """The layers of an architecture cannot be cut, transplanted or merged.

    Examples:
        >>> from not_hf import DonorConfig
        >>> DonorConfig(organ_config={"model_type": "unheard-of"}).native_config()
        Traceback (most recent call last):
        not_hf.errors.UnsupportedArchitectureError: this release of transformers does not have model_type ...
    """


class CorruptDonorError(NotHFError):
    """The files or config of a donor are damaged or contradict each other.

    Examples:
        >>> from not_hf import DonorConfig
        >>> DonorConfig(layers=[4, 7]).check()
        Traceback (most recent call last):
        not_hf.errors.CorruptDonorError: donor config has no base_config with a model_type; cut the organ again
    """


def some(problems: Sequence[object]) -> str:
    """Join the first five problems, each of at most 300 characters, in one line."""
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(" ".join(str(problem).split())[:300] for problem in problems[:5]) + more


def interval(span: Sequence[int]) -> str:
    """Write a half-open span of layers: `[4, 7)`."""
    return f"[{span[0]}, {span[1]})"


def megabytes(size: int) -> str:
    """Write a number of bytes: `85.1 MB`, and `0.0031 MB` where one digit would be zero."""
    return f"{size / 1e6:,.{1 if size >= 50_000 else 4}f} MB"


@contextlib.contextmanager
def reaching_hub(what: str) -> Iterator[None]:
    """Turn a failure to reach the Hub into a `ConnectionError`; errors that the Hub answers with pass unchanged.

    Args:
        what: What failed, for the error.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError:  # an answer, and an OSError
        raise
    except HTTPError as error:
        raise ConnectionError(f"{what}, the Hub cannot be reached: {one_line(error)}") from error


def require_plain_token(token: object) -> None:
    """Refuse a token with a line break or the like before it is sent: the client's error would spell it out.

    Raises:
        NotHFError: The token has characters that no token has.
    """
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and " " not in token):
        raise NotHFError("the token holds a line break, a space or a character that no token has; copy it again")


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return the message of an error in one line of at most `limit` characters; its class, if it has none."""
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
        with reading_repo(base):
            yield
    except OSError as error:
        if donor is None:
            raise
        raise OSError(
            f"{donor} names {base} as its base, which cannot be read: {one_line(error)}; to use another copy, "
            f"name it: TransplantedForCausalLM.from_pretrained(base, {donor!r}), AutoTokenizer.from_pretrained(base)"
        ) from error


@contextlib.contextmanager
def reading_repo(name: str) -> Iterator[None]:
    """If a folder or repo cannot be read in the block, the error says what is wrong with its name, if that is it.

    Raises:
        OSError: It cannot be read.
    """
    try:
        yield
    except NotHFError:
        raise
    except (OSError, ValueError) as error:
        if problem := _name_problem(name, error):
            raise OSError(problem) from error
        raise


def _name_problem(name: str, error: BaseException) -> str | None:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isfile(name) and not name.endswith(".json"):
        return (
            f"{name} is a file, where a folder or Hub ID is expected; to import layers saved with torch.save, use "
            "not_hf.import_checkpoint or `not-hf import`"
        )
    if os.path.exists(name):
        return None
    if os.path.splitext(name)[1] in _FILES:
        return f"there is no file {name}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return f"there is no such folder, {name}, and it is not a Hub ID, which is owner/name"
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return (
            f"there is no such folder, {name}, no repo of that name in the cache, and the Hub cannot be asked now; "
            "correct the name, or go online once"
        )
    return None
