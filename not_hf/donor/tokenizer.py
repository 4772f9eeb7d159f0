"""The tokenizer or processor of a donor: that of its base, copied into the donor's folder if the base is local."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)

from not_hf.architecture.stack import layers_config
from not_hf.architecture.upstream import AUTO_KWARGS, HUB_KWARGS
from not_hf.cards.common import hub_id
from not_hf.config import DonorConfig
from not_hf.errors import NotHFError, one_line, reading_base

logger = logging.getLogger(__name__)

# Not all of them are written by every tokenizer, and a load reads what an earlier one has left
TOKENIZER_FILES = (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)


class DonorTokenizer:
    """Redirects `AutoTokenizer.from_pretrained(donor)` to the donor's base."""

    auto_class: ClassVar[Any] = AutoTokenizer

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *inputs: Any, **kwargs: Any
    ) -> Any:
        """Load that of the base, at its recorded revision. Arguments as in the Auto class."""
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        config = DonorConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        if not config.base_model_name_or_path:
            raise NotHFError(
                f"{pretrained_model_name_or_path} does not name its base; load the base's tokenizer by its own name"
            )
        # arguments for the donor's repo do not apply to the base: revision, subfolder, trust in its code, …
        own = ("subfolder", "revision", "trust_remote_code", "config", *AUTO_KWARGS)
        kwargs = {key: value for key, value in kwargs.items() if key not in own}
        shared = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        base, where = config.base_model_name_or_path, {"revision": config.base_revision}
        if config.base_subfolder:
            where["subfolder"] = config.base_subfolder
        with reading_base(base, os.fspath(pretrained_model_name_or_path)):
            base_config = AutoConfig.from_pretrained(base, **where, **shared)
            if isinstance(base_config, DonorConfig):
                raise NotHFError(f"{pretrained_model_name_or_path} names {base} as its base, which is a donor")
            found = cls.auto_class.from_pretrained(base, *inputs, **where, **kwargs)
        if lacks_tokens(found, config):
            logger.warning(
                "%s has rows for tokens that the tokenizer of its base, %s, lacks; save the one that it was trained "
                "with beside it",
                pretrained_model_name_or_path,
                base,
            )
        return found


class DonorProcessor(DonorTokenizer):
    """Redirects `AutoProcessor.from_pretrained(donor)` to the donor's base."""

    auto_class = AutoProcessor


def lacks_tokens(tokenizer: Any, *donors: DonorConfig) -> bool:
    """Whether a tokenizer, or that of a processor, lacks tokens that donors have rows for."""
    rows = (ids for config in donors for ids in (config.trainable_token_indices or {}).values())
    return any(max(ids) >= len(getattr(tokenizer, "tokenizer", tokenizer)) for ids in rows)


def save_local_tokenizer(config: DonorConfig, folder: str | os.PathLike[str], draft: str | os.PathLike[str]) -> None:
    """Save the tokenizer of a donor's local base in `draft`, unless `folder`, to which the draft is moved, has one.

    Of a base for images or sounds, the processor is saved, of which the tokenizer is a part. A tokenizer that lacks
    tokens of the donor is left out, for the donor needs its own; and, with a warning, one with code of its own: saving
    a donor runs no code, and asks nothing.
    """
    base = config.base_model_name_or_path
    if os.path.exists(os.path.join(folder, TOKENIZER_CONFIG_FILE)):
        warn_of_another_base(config, folder)
        return
    if base is None or not os.path.isdir(base):
        return
    base = str(Path(base, config.base_subfolder or ""))
    try:
        native = AutoConfig.from_pretrained(base)
        auto_class: Any = AutoTokenizer if layers_config(native) is native else AutoProcessor
        found = auto_class.from_pretrained(base, trust_remote_code=False)
        if not lacks_tokens(found, config):
            found.save_pretrained(draft)
    except ImportError as error:  # of what a processor needs
        logger.warning("the processor of %s is not saved with the donor: %s", base, one_line(error, 200))
    except (OSError, ValueError) as error:  # a base without a tokenizer is still a base
        if "trust_remote_code" in str(error):
            logger.warning(
                "the tokenizer of %s has code of its own, so it is not saved with the donor; load it from there: "
                "AutoTokenizer.from_pretrained(%r, trust_remote_code=True)",
                base,
                base,
            )


def warn_of_another_base(config: DonorConfig, folder: str | os.PathLike[str]) -> None:
    """Warn if the tokenizer in a folder, which is kept, may be that of the base of the donor saved there before."""
    try:
        before = DonorConfig.from_pretrained(folder)
    except (OSError, ValueError):  # no donor, or one that the save replaces
        return
    old, new = ((each.base_model_name_or_path, each.base_subfolder) for each in (before, config))
    if old != new and old[0] and hub_id(old[0]) is None:
        logger.warning(
            "the tokenizer beside the donor is kept, but the donor saved there before was of another base, %s; if it "
            "is the tokenizer of that base, delete its files and save again",
            "/".join(filter(None, old)),
        )
