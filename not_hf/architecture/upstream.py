"""DeepSpeed ZeRO-3: its parameters are empty tensors whose values lie in parts on other processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.integrations import deepspeed


@contextlib.contextmanager
def built_whole() -> Iterator[None]:
    """Models built inside the block are whole on each process, even where transformers would partition them at once.

    DeepSpeed partitions them when training begins; until then organs can be checked and put in.
    """
    reference: Any = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed has taken a module's parameters apart."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())
