"""What `AutoTokenizer` resolves to for a donor repo that brings no tokenizer of its own: the base's."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from not_hf.bases import reading_base
from not_hf.config import DonorConfig
from not_hf.cutting import HUB_KWARGS
from not_hf.errors import NotHFError


class DonorTokenizer:
    """Redirects `AutoTokenizer.from_pretrained(donor)` to the base named in the donor's config."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *inputs: Any, **kwargs: Any
    ) -> PreTrainedTokenizerBase:
        """Load the base's tokenizer at the base's recorded revision; arguments as in `AutoTokenizer`."""
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        config = DonorConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        if not config.base_model_name_or_path:
            raise NotHFError(f"{pretrained_model_name_or_path} names no base to take a tokenizer from")
        # what was given for the donor's repo does not hold for another: its revision, and trust in its code
        own = ("subfolder", "revision", "trust_remote_code", "_commit_hash", "config")
        kwargs = {key: value for key, value in kwargs.items() if key not in own}
        shared = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        base = config.base_model_name_or_path
        with reading_base(base, os.fspath(pretrained_model_name_or_path)):
            base_config = AutoConfig.from_pretrained(base, revision=config.base_revision, **shared)
            if isinstance(base_config, DonorConfig):
                raise NotHFError(f"{pretrained_model_name_or_path} names {base} as its base, which is a donor itself")
            return AutoTokenizer.from_pretrained(base, *inputs, revision=config.base_revision, **kwargs)
