"""Recipients whose weights are packed in 4 or 8 bits: told apart, and made plain where somebody asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.layers import computes
from not_hf.architecture.upstream import can_dequantize, tables_of
from not_hf.errors import NotHFError


def is_quantized(model: nn.Module) -> bool:
    """Whether a model computes with packed weights, loaded so or quantized afterwards.

    transformers' quantizer alone does not say so: it stays on a model whose GGUF file it dequantized.
    """
    if any(_is_packed(parameter) or not computes(parameter) for parameter in model.parameters()):
        return True
    return getattr(model, "hf_quantizer", None) is not None and quantization_name(model) != "gguf"


def quantization_name(model: nn.Module) -> str:
    """Who packed a model's weights, for messages."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return next((type(p).__name__ for p in model.parameters() if _is_packed(p)), "8 bit")
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


@contextlib.contextmanager
def dequantized(model: PreTrainedModel) -> Iterator[None]:
    """Make a model's weights plain, in the dtype it computes in; packed again if the block raises.

    A model that is neither packed nor came from a quantizer is left alone.

    transformers does it where it can (bitsandbytes, HIGGS); tensors that know how (torchao, quanto) do it themselves.

    Raises:
        NotHFError: Neither can; the model is as it was.
    """
    if not is_quantized(model) and getattr(model, "hf_quantizer", None) is None:
        yield
        return
    if any(parameter.is_meta for parameter in model.parameters()):
        raise NotHFError(
            "a quantized recipient cannot be dequantized while it is offloaded; load it without offloading"
        )
    if any(_packed_for_cpu(parameter) for parameter in model.parameters()):
        raise NotHFError(
            "bitsandbytes cannot dequantize 4-bit weights that have run on CPU; load the recipient and the organ "
            "again and merge before the first forward, or load without quantization"
        )
    config = vars(model.config)
    saved = [(attributes, dict(attributes)) for attributes in (config, vars(model))]
    saved += [(table, dict(table)) for module in model.modules() for table in tables_of(module)]
    quantizer: Any = getattr(model, "hf_quantizer", None)
    name = quantization_name(model)
    try:
        if can_dequantize(quantizer):
            model.dequantize()
        elif (_unpack(model) or name == "gguf") and quantizer is not None:
            quantizer.remove_quantization_config(model)
        if is_quantized(model):
            raise NotHFError(f"{name} weights cannot be dequantized; load the recipient without quantization to merge")
        yield
    except BaseException:
        for table, before in saved:
            table.clear()
            table.update(before)
        raise


@torch.no_grad()
def _unpack(model: nn.Module) -> bool:
    """Have tensors that are packed by their class give themselves out plain, in plain modules; whether any did."""
    found = False
    for path, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        packed = {key: parameter for key, parameter in parameters.items() if _is_packed(parameter)}
        if packed and isinstance(module, nn.Linear) and type(module) is not nn.Linear:  # quanto's
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            for key, parameter in parameters.items():
                plain.register_parameter(key, parameter)
            model.set_submodule(path, plain.train(module.training))
            module = plain
        for key, parameter in packed.items():
            module.register_parameter(key, nn.Parameter(parameter.dequantize().to(parameter.dtype)))
            found = True
    return found


def _is_packed(parameter: torch.Tensor) -> bool:
    """Whether the tensor's class packs it: it has its own way to give itself out plain."""
    return type(parameter).dequantize is not torch.Tensor.dequantize


def _packed_for_cpu(parameter: torch.Tensor) -> bool:
    """Whether bitsandbytes laid 4-bit weights out for its CPU kernel: `dequantize` would read them wrongly (0.50)."""
    return bool(getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False))
