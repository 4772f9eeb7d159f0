"""Shared parts of model cards: cards name only public repos, and a later save keeps edits by people."""

from __future__ import annotations

import functools
import logging
import os
import re
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from not_hf.errors import NotHFError, one_line, printable
from not_hf.limits import MAX_CARD, MAX_DEPTH
from not_hf.version import INSTALL

LIBRARY = "not_hf"
README = "README.md"
DONOR_TAG = "not-hf"  # of donors only: `list_donors` searches for it
ADAPTER_TAG = "base_model:adapter:"  # before the Hub ID of the base
METHOD_TAGS = ("neural-organ-transplantation", "arxiv:2601.13580")  # of everything made with the method
# The Hub's names of tasks, by the Auto class of the model
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}

# A part of a card that not_hf writes. Cards of versions without checksums have the block "facts" only. No part holds
# the mark of another one: so a text of marks alone is searched once, not once per mark.
_BLOCK = re.compile(
    r"<!-- not_hf (?P<name>\w{1,20})(?: (?P<checksum>\w{1,20}))?:[^<>]{0,200}-->"
    r"(?P<body>(?:(?!<!-- /?not_hf ).)*)<!-- /not_hf (?P=name) -->",
    re.DOTALL,
)
# As huggingface_hub finds it
_METADATA = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)
_MARKUP = re.compile(r"[\\`*<>&|\[\]]")  # what Markdown and HTML take for more than text
_ADDRESS = re.compile(r"://|\bwww\.|@", re.IGNORECASE)

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML was built with it

logger = logging.getLogger(__name__)


def hub_id(name: str | None) -> str | None:
    """Return `name` if it is a valid Hub ID and not a local path, else `None`."""
    return name if name and not os.path.exists(name) and _is_valid_id(name) else None


def _is_valid_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def named_base(name: str | None) -> str | None:
    """Return `hub_id(name)`, with a warning if the card cannot name the base."""
    if name and not hub_id(name):
        reason = "is not a Hub ID; use its Hub ID if people are to find your work by it"
        if _is_valid_id(name):
            reason = (
                "is a folder here, and elsewhere the Hub's repo of that name would be taken for it; "
                f"give the folder as './{name}', or use the base's Hub ID"
            )
        warn_once(f"the model card names no base_model: {name!r} {reason}")
    return hub_id(name)


def short_name(name: str | None) -> str:
    """Return the last part of a Hub ID or path; the rest of a path is private."""
    return os.path.basename(os.path.normpath(name or "an unnamed model"))


def unite(*lists: str | list[str] | None) -> list[str]:
    """Return the distinct items of all lists, in order; a string counts as one item."""
    listed = ([some] if isinstance(some, str) else some or [] for some in lists)
    return list(dict.fromkeys(str(item) for some in listed for item in some if item is not None))


@functools.cache  # training saves often
def warn_once(message: str) -> None:
    """Log a warning once per process."""
    logger.warning(message)


def render(template: str, data: ModelCardData, **values: Any) -> ModelCard:
    """Render a card from a file in `templates/`, where `{% call block("name") %}` marks what later saves rewrite."""
    values |= {"block": _block, "shown": shown, "code": _code, "linked": _linked, "hub_id": hub_id}
    values |= {"install": INSTALL, "short_name": short_name}
    return ModelCard(_compiled(template).render(card_data=data.to_yaml(), **{**data.to_dict(), **values}))


@functools.cache  # `ModelCard.from_template` would compile it at each save
def _compiled(template: str) -> jinja2.Template:
    return jinja2.Template((Path(__file__).parent / "templates" / template).read_text("utf-8"))


def _block(name: str, caller: Callable[[], str]) -> str:
    body = re.sub(r"\n{3,}", "\n\n", caller().strip())
    mark = f"{name} {_checksum(body)}: rewritten at every save until somebody edits it"
    if name == "facts":
        mark = "facts: what stands between these two comments is rewritten at every save"
    return f"<!-- not_hf {mark} -->\n\n{body}\n\n<!-- /not_hf {name} -->"


def shown(value: object) -> str:
    """Format a text for a card so that it is shown as it is, in one line: without markup, HTML, links and images.

    Every text that a config holds goes through here, through `_code`, or is a Hub ID.
    """
    return " ".join(_code(word) if _ADDRESS.search(word) else _MARKUP.sub(r"\\\g<0>", word) for word in _words(value))


def _code(value: object) -> str:
    """Format a text as code, in which renderers look for no links either."""
    text = " ".join(_words(value)).replace("`", "'").replace("|", "\\|").replace("<!--", "<! --")
    return f"`{text}`"


def _words(value: object) -> list[str]:
    return printable(str(value)).split()


def _linked(name: str | None) -> str:
    """Return a Markdown link if `name` is a Hub ID, else its `short_name` as code."""
    return f"[{name}](https://huggingface.co/{name})" if hub_id(name) else _code(short_name(name))


def _checksum(text: str) -> str:
    """Compute a checksum that ignores whitespace."""
    return f"{zlib.crc32(' '.join(text.split()).encode()):08x}"


def _is_edited(block: re.Match[str]) -> bool:
    return block["checksum"] is not None and block["checksum"] != _checksum(block["body"])


def updated(path: str | os.PathLike[str], new: ModelCard) -> ModelCard:
    """Return the card at `path` updated with `new`, or `new` if there is none. Nothing is written.

    In the text, blocks written by not_hf are replaced unless edited; "facts" is always replaced. In the metadata, the
    keys of `new` are set, and tags, datasets and results are merged. Everything else stays: other text and keys, the
    order of keys, the licence, and line endings.

    Raises:
        NotHFError: The metadata of the card at `path` cannot be read.
    """
    if not os.path.exists(path):
        return new
    card = _load(path)
    blocks = {block["name"]: block.group().replace("\r\n", "\n") for block in _BLOCK.finditer(new.text)}
    facts = "".join(block.group() for block in _BLOCK.finditer(card.text) if block["name"] == "facts")

    def rewritten(block: re.Match[str]) -> str:
        if block["name"] not in blocks or _is_edited(block):
            return block.group()
        return blocks[block["name"]].replace("\n", "\r\n" if "\r\n" in block.group() else "\n")

    card.text = _BLOCK.sub(rewritten, card.text) if card.text.strip() else new.text
    _update_metadata(cast(ModelCardData, card.data), cast(ModelCardData, new.data), facts)
    return card


def has_own_text(path: str | os.PathLike[str]) -> bool:
    """Whether the card at `path` has text that not_hf did not write."""
    text = _load(path).text if os.path.exists(path) else ""
    return bool(_BLOCK.sub(lambda block: block.group() if _is_edited(block) else "", text).strip())


def read_card(path: str | os.PathLike[str]) -> str:
    """Read a card.

    Raises:
        ValueError: It is too large, or its metadata are nested too deep or have aliases, which unfold without end.
        yaml.YAMLError: Its metadata are not YAML.
        OSError: It cannot be read.
    """
    if (size := os.path.getsize(path)) > MAX_CARD:
        raise ValueError(f"{size:,} bytes; at most {MAX_CARD:,} are read")
    text = Path(path).read_bytes().decode("utf-8-sig")
    metadata, depth = _METADATA.match(text), 0
    for event in yaml.parse(metadata[1], Loader=_LOADER) if metadata else ():
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"the alias *{event.anchor} in its metadata; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"its metadata are nested more than {MAX_DEPTH} deep")
    return text


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata of a card; raises as `read_card`."""
    metadata = _METADATA.match(read_card(path))
    values = yaml.load(metadata[1], Loader=_LOADER) if metadata else {}
    if not isinstance(values, dict | None):
        raise ValueError("its metadata must be names and values")
    return values or {}


def _load(path: str | os.PathLike[str]) -> ModelCard:
    try:
        # ModelCard.load of huggingface_hub 2.2 reads a byte order mark as text
        card = ModelCard(read_card(path))
        if isinstance(tag := read_metadata(path).get("tags"), str):  # huggingface_hub 1 takes it for a list of letters
            card.data["tags"] = [tag]
        if not all(isinstance(card.data.get(key, []), str | list) for key in ("tags", "datasets")):
            raise ValueError("tags and datasets must be lists")
        return card
    except (ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:  # malformed metadata
        reason = one_line(error, 200)
        raise NotHFError(f"{path} has metadata that cannot be read ({reason}); correct or remove it") from error


def _update_metadata(old: ModelCardData, new: ModelCardData, facts: str) -> None:
    """Update `old` with the keys of `new`; `facts` is the block "facts" of the old card."""
    outdated = [tag for tag in unite(old.tags) if tag.startswith("base_model:")] if new.base_model else []
    outdated += [DONOR_TAG] if new.library_name != LIBRARY else []
    rows = [row.strip("| ").split(" | ") for row in facts.splitlines()]
    numbers = {(name, value) for name, *cells in rows for value in cells}
    results = [result for result in old.eval_results or [] if not _is_ours(result, new, numbers)]
    results += new.eval_results or []
    values = {key: value for key, value in vars(new).items() if value is not None}
    values |= {
        "tags": [tag for tag in unite(old.tags, new.tags) if tag not in outdated or tag in unite(new.tags)],
        "datasets": unite(old.datasets, new.datasets) or None,
        "eval_results": results or None,
        "model_name": (old.model_name or new.model_name) if results else None,  # part of the model-index
    }
    if old.license:
        if new.license and new.license != old.license:
            warn_once(
                f"the card keeps the licence it has, {old.license!r}, not {new.license!r}; "
                "change it in the card's metadata if it no longer holds"
            )
        values = {key: value for key, value in values.items() if not key.startswith("license")}
    vars(old).update(values)


def _is_ours(result: EvalResult, new: ModelCardData, numbers: Collection[tuple[str, str]]) -> bool:
    """Whether not_hf wrote a result: it is measured again in `new`, or it is one of the `numbers` of the old card."""
    if any(result.is_equal_except_value(other) for other in new.eval_results or []):
        return True
    if not isinstance(result.metric_value, int | float):
        return False
    return (shown(result.metric_name), f"{result.metric_value:.4g}") in numbers
