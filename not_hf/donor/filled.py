"""`FilledModel`: a stripped native model that is built from tensors, strictly."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Self

import torch

from not_hf.architecture import upstream
from not_hf.architecture.file_layout import forget_conversions
from not_hf.architecture.layers import is_finite
from not_hf.config import OrganSpec
from not_hf.donor.loading import common_dtype, expert_problems, loading_problems, refuse
from not_hf.donor.saved_modules import attach, is_saved, saved_problems
from not_hf.donor.stripped import StrippedModel
from not_hf.errors import CorruptDonorError, one_line
from not_hf.limits import MAX_VALUES_BESIDE, MAX_VALUES_PER_STORED


class FilledModel(StrippedModel):
    """The base class of `DonorModel`, with what builds it from tensors."""

    @classmethod
    def load_tensors(
        cls,
        spec: OrganSpec,
        tensors: Mapping[str, Any],
        dtype: str | torch.dtype | None = "auto",
        *model_args: Any,
        source: str = "the checkpoint",
        partial: bool = False,
        foreign: bool = False,
        **kwargs: Any,
    ) -> tuple[Self, set[str]]:
        """Build a donor from tensors, strictly.

        Args:
            spec: Checked config of the donor.
            tensors: Tensors or lazy views by their names in a checkpoint.
            dtype: dtype of the donor; `"auto"`: the most frequent one.
            source: Source of the tensors, for errors.
            partial: Accept missing tensors, for one shard of a checkpoint.
            foreign: Accept unexpected tensors, which old checkpoints of a base may have.
            **kwargs: As in `fill`.

        Returns:
            The donor, and the names of missing tensors.

        Raises:
            CorruptDonorError: A tensor is missing, unexpected, mis-shaped, non-finite or not floating-point.
        """
        if not partial:
            refuse(source, expert_problems(tensors))
            stored = sum(math.prod(tensor.shape) for tensor in tensors.values())
            kwargs["max_values"] = MAX_VALUES_PER_STORED * stored + MAX_VALUES_BESIDE
        beside = {name: tensor for name, tensor in tensors.items() if is_saved(name)}
        problems = saved_problems(spec.config, beside, partial)
        filling = {name: each for name, each in tensors.items() if not (problems and name in beside)}
        organ, info = cls.fill(spec, filling, dtype, *model_args, source=source, **kwargs)
        refuse(source, loading_problems(info, partial, foreign) + problems)
        state = organ.state_dict().items()
        refuse(source, [f"non-finite values in {name}" for name, t in state if not (t.is_meta or is_finite(t))])
        return organ, set(info["missing_keys"])

    @classmethod
    def fill(
        cls,
        spec: OrganSpec,
        tensors: Mapping[str, Any],
        dtype: str | torch.dtype | None = "auto",
        *model_args: Any,
        source: str,
        quantization: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Self, dict[str, Any]]:
        """Build a donor and load the tensors that fit. Other arguments as in `load_tensors`.

        Args:
            quantization: The base's `quantization_config`, which transformers uses to dequantize the tensors.
            **kwargs: As in `PreTrainedModel.from_pretrained`.

        Returns:
            The donor, and transformers' `output_loading_info` for `loading_problems`.

        Raises:
            CorruptDonorError: There are no tensors, or they cannot be converted to the layout of the modules.
        """
        beside = {name: tensor for name, tensor in tensors.items() if is_saved(name)}
        if not tensors.keys() - beside.keys():
            raise CorruptDonorError(f"{source}: the checkpoint holds no tensors of layers")
        if dtype in (None, "auto"):
            dtype = common_dtype(tensors)
        config = spec.config
        if quantization is not None:
            config = copy.deepcopy(config)
            config.quantization_config = quantization  # transformers removes it after dequantizing
        options: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True, "dtype": dtype}
        options |= {
            "config": config,
            "spec": spec,
            "state_dict": {name: tensor for name, tensor in tensors.items() if name not in beside},
        }
        try:
            with upstream.built_whole(), upstream.without_load_report():
                loaded: Any = super().from_pretrained(None, *model_args, **options, **kwargs)
        except RuntimeError as error:  # from transformers' conversion of the tensors
            raise CorruptDonorError(f"{source}: {one_line(error, 300)}") from error
        organ, info = loaded
        organ.config.name_or_path = organ.name_or_path = ""  # not "None", as transformers has it
        forget_conversions(organ)
        attach(organ, {name: tensor[...].to(organ.dtype) for name, tensor in beside.items()})
        return organ, info
