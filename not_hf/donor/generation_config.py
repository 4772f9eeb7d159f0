"""The `generation_config.json` beside a donor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from not_hf.architecture.upstream import fetch_file
from not_hf.errors import CorruptDonorError, one_line

# Keys of a generation config that choose how to compute, not what: the caller's choice
_CALLERS = ("compile_config", "cache_implementation", "cache_config", "disable_compile")


def read_generation_config(source: str, hub_kwargs: Mapping[str, Any]) -> GenerationConfig | None:
    """Read the `generation_config.json` of a donor, if any.

    Args:
        source: Folder or Hub ID.
        hub_kwargs: With a pinned revision.

    Raises:
        CorruptDonorError: It is no generation config.
    """
    path = fetch_file(source, GENERATION_CONFIG_NAME, **hub_kwargs)
    if path is None:
        return None
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = values.keys() - GenerationConfig().to_dict().keys()  # of another release, or of a model's own
        if hiding := sorted(key for key in unknown if hasattr(GenerationConfig, key)):
            raise ValueError(f"the keys {', '.join(hiding)} would hide methods")
        return GenerationConfig.from_dict({key: value for key, value in values.items() if key not in _CALLERS})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptDonorError(f"{source}: generation_config.json: {one_line(error, 300)}") from error
