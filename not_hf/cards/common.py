"""What all cards have in common: they name only what is on the Hub, and keep what people wrote into the one before."""

from __future__ import annotations

import functools
import logging
import os
import re
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from not_hf.errors import NotHFError, one_line

LIBRARY = "not_hf"
README = "README.md"
DONOR_TAG = "not-hf"  # of donors alone: `list_donors` goes by it
ADAPTER_TAG = "base_model:adapter:"  # before the Hub ID of the base
METHOD_TAGS = ("neural-organ-transplantation", "arxiv:2601.13580")  # of everything made with the method

_FACTS = re.compile(r"<!-- not_hf facts:.*?<!-- /not_hf facts -->", re.DOTALL)
_LICENSE = ("license", "license_name", "license_link")

logger = logging.getLogger(__name__)


def hub_id(name: str | None) -> str | None:
    """`name` when it can be a Hub ID and is nothing local."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def named_base(name: str | None) -> str | None:
    """`hub_id`, with a warning that a card leaves out what is not on the Hub."""
    found = hub_id(name)
    if name and found is None:
        warn_once(
            f"the model card names no base_model: {name!r} is not a Hub ID; "
            "use its Hub ID if people are to find your work by it"
        )
    return found


def short_name(name: str | None) -> str:
    """The last part of a Hub ID or of a path, which is nobody's business."""
    return os.path.basename(os.path.normpath(name or "an unnamed model"))


def linked(name: str | None) -> str:
    """A link to what is on the Hub, else its `short_name`."""
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{found})" if found else f"`{short_name(name)}`"


def cell(value: object) -> str:
    """One line without a column separator, for a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


@functools.cache  # once each: training saves often
def warn_once(message: str) -> None:
    """Log a warning that would be repeated at every save."""
    logger.warning(message)


def updated(path: str | os.PathLike[str], card: ModelCard) -> ModelCard:
    """`card`, or the one that is at `path` already, brought up to it. Nothing is written.

    A card that is there keeps its text, its metadata with unknown keys and their order, its licence and its line
    ends. Only the facts between the two `not_hf facts` comments are rewritten, our metadata keys are set, and tags,
    datasets and results united.

    Raises:
        NotHFError: Its metadata cannot be read.
    """
    if not os.path.exists(path):
        return card
    existing = load(path)
    facts, new_facts = _FACTS.search(existing.text), _FACTS.search(card.text)
    _update(cast(ModelCardData, existing.data), cast(ModelCardData, card.data), facts.group() if facts else "")
    if facts and new_facts:
        line_end = "\r\n" if "\r\n" in facts.group() else "\n"
        text = new_facts.group().replace("\n", line_end)
        existing.text = existing.text[: facts.start()] + text + existing.text[facts.end() :]
    return existing


def load(path: str | os.PathLike[str]) -> ModelCard:
    """The card at `path`.

    Raises:
        NotHFError: Its metadata cannot be read.
    """
    try:
        # as bytes, to keep its line ends; ModelCard.load has taken a byte order mark for text
        card = ModelCard(Path(path).read_bytes().decode("utf-8-sig"))
        for key in ("tags", "datasets"):
            if not isinstance(card.data.get(key, []), str | list):
                raise ValueError(f"{key} must be a list")
        return card
    except (
        ValueError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
    ) as error:  # of another shape
        reason = one_line(error, 200)
        raise NotHFError(f"{path} has metadata that cannot be read ({reason}); mend or remove it") from error


def without_facts(text: str) -> str:
    """What of a card's text is its author's to change, with plain line ends."""
    return _FACTS.sub("", text.replace("\r\n", "\n")).strip()


def unite(*lists: str | list[str] | None) -> list[str]:
    """What is in any of the lists, once each, in order; a lone string is a list of one."""
    listed = ([some] if isinstance(some, str) else some or [] for some in lists)
    return list(dict.fromkeys(str(item) for some in listed for item in some if item is not None))


def _update(old: ModelCardData, ours: ModelCardData, facts: str) -> None:
    """Bring metadata up to ours, keeping what people wrote into it; `facts` are those that the card had so far."""
    tags = unite(old.tags)
    if ours.base_model:
        # those of the base it had before go
        tags = [tag for tag in tags if not tag.startswith("base_model:") or tag in unite(ours.tags)]
    if ours.library_name != LIBRARY:
        tags = [tag for tag in tags if tag != DONOR_TAG]
    results = [result for result in old.eval_results or [] if not _outdated(result, ours, facts)]
    results += ours.eval_results or []
    merged = {
        "tags": unite(tags, ours.tags),
        "datasets": unite(old.datasets, ours.datasets) or None,
        "eval_results": results or None,
        # of the model-index, which goes with its last result
        "model_name": (old.model_name or ours.model_name) if results else None,
    }
    if old.get("license"):
        if ours.license and ours.license != old.license:
            warn_once(
                f"the card keeps the licence it has, {old.license!r}, not {ours.license!r}; "
                "change it in the card's metadata if it no longer holds"
            )
        merged |= {key: old.get(key) for key in _LICENSE}
    for key, value in {**ours.__dict__, **merged}.items():
        if value is not None or key in merged:
            old[key] = value


def _outdated(result: EvalResult, ours: ModelCardData, facts: str) -> bool:
    """Whether we wrote a result: it is measured anew, or among the numbers that the card's facts gave so far."""
    if any(result.is_equal_except_value(other) for other in ours.eval_results or []):
        return True
    if not isinstance(result.metric_value, int | float):
        return False
    row = rf"^\| {re.escape(str(result.metric_name))} \|.*\| {re.escape(f'{result.metric_value:.4g}')} \|"
    return re.search(row, facts, re.MULTILINE) is not None
