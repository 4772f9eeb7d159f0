"""Strict loading: report damaged, missing, unexpected, mis-shaped, empty and non-floating-point tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.utils import TensorInfo

from not_hf.config import DonorConfig
from not_hf.errors import CorruptDonorError, NotHFError, some
from not_hf.hub.checkpoint import FLOAT_DTYPES, View, file_names, open_checkpoint
from not_hf.hub.consistent_read import require_same_save, saved_digests
from not_hf.hub.digest import digest_problem

_EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,6})\.(.+)")


def open_tensors(
    source: str, config: DonorConfig, hub_kwargs: Mapping[str, Any], variant: str | None = None, verify: bool = False
) -> dict[str, View]:
    """Open the tensors that were saved with a config, without reading them unless to verify them.

    Args:
        source: Folder or Hub ID.
        config: Config that was read there, or another one for these tensors, which then has no digests.
        hub_kwargs: With a pinned revision.
        variant: As in `open_checkpoint`, like the errors; `None`: what the config says.
        verify: Compare the tensors with their digest.

    Raises:
        CorruptDonorError: The folder was saved again since, a tensor is empty or not floating-point, or the digest
            differs.
        NotHFError: There is no digest to verify.
    """
    variant = variant or config.weights_variant
    subfolder, file = hub_kwargs.get("subfolder"), file_names(variant)[0]
    digests = config.digests or saved_digests(source, subfolder)
    tensors = open_checkpoint(source, variant=variant, **hub_kwargs)
    require_same_save(source, subfolder, digests)
    refuse(source, tensor_problems(tensors))
    if verify:
        if file not in (digests or {}):
            raise NotHFError(
                f"{source} cannot be verified: its config.json has no digest of {file}, as earlier versions of not_hf "
                "saved donors; load it without verify=True and save it again"
            )
        refuse(source, digest_problem(tensors, digests, variant))
    return tensors


def loading_problems(info: dict[str, Any], partial: bool = False, foreign: bool = False) -> list[str]:
    """Report tensors in transformers' `output_loading_info`, without missing if `partial`, unexpected if `foreign`."""
    problems = [] if partial else [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [] if foreign else [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
    return problems + [
        f"{name} has shape {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]


def tensor_problems(tensors: Mapping[str, View | TensorInfo]) -> list[str]:
    """Report tensors that are not floating-point or are empty."""
    return [
        f"tensor {name} is {tensor.dtype}, not floating-point"
        for name, tensor in tensors.items()
        if tensor.dtype not in FLOAT_DTYPES
    ] + [f"tensor {name} is empty, shape {tensor.shape}" for name, tensor in tensors.items() if 0 in tensor.shape]


def expert_problems(tensors: Mapping[str, Any]) -> list[str]:
    """Report missing, unexpected and mis-shaped tensors of experts, of which transformers stacks those it finds."""
    lists: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {}  # shapes by list, name and number
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            lists.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tuple(tensor.shape)
    problems = []
    for path, kinds in lists.items():
        num_experts = len({n for shapes in kinds.values() for n in shapes})
        for key, shapes in kinds.items():
            usual = Counter(shapes.values()).most_common(1)[0][0]
            problems += [f"missing {path}.{n}.{key}" for n in range(num_experts) if n not in shapes]
            problems += [f"unexpected {path}.{n}.{key}" for n in sorted(shapes) if n >= num_experts]
            problems += [
                f"{path}.{n}.{key} has shape {shape}, expected {usual}"
                for n, shape in sorted(shapes.items())
                if shape != usual
            ]
    return problems


def refuse(source: str, problems: Sequence[str]) -> None:
    """Raise problems, if there are any."""
    if problems:
        raise CorruptDonorError(f"{source}: {some(problems)}")


def dtype_of(tensor: torch.Tensor | View | TensorInfo) -> torch.dtype | None:
    """Return the dtype of a tensor in memory or in a file; `None` if it is not floating-point."""
    if isinstance(tensor, torch.Tensor):
        return tensor.dtype if tensor.is_floating_point() else None
    return getattr(torch, FLOAT_DTYPES.get(tensor.dtype, ""), None)


def common_dtype(tensors: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of most floating-point values in a checkpoint."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if dtype := dtype_of(tensor):
            sizes[dtype] += math.prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
