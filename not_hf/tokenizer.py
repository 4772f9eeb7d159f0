"""What `AutoTokenizer` resolves to for a donor repo that brings no tokenizer of its own: the base's."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
        kwargs = {key: value for key, value in kwargs.items() if key not in ("subfolder", "_commit_hash")}
        kwargs["revision"] = config.base_revision
        return AutoTokenizer.from_pretrained(config.base_model_name_or_path, *inputs, **kwargs)
