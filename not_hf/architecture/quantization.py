"""Recipients with weights of 4 or 8 bits: how to recognize and to dequantize them."""

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
    """Whether a model computes with packed weights, quantized on loading or afterwards.

    A quantizer of transformers alone does not mean that: it stays on a model whose GGUF file it has dequantized.
    """
    if any(_is_packed(parameter) or not computes(parameter) for parameter in model.parameters()):
        return True
    return getattr(model, "hf_quantizer", None) is not None and quantization_name(model) != "gguf"


def quantization_name(model: nn.Module) -> str:
    """The method that quantized a model, for messages."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return next((type(p).__name__ for p in model.parameters() if _is_packed(p)), "8 bit")
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


@contextlib.contextmanager
def dequantized(model: PreTrainedModel) -> Iterator[None]:
    """Dequantize a model's weights to the dtype that it computes in; undone if the block raises.

    A model that was never quantized stays as it is. transformers dequantizes what it can (bitsandbytes, HIGGS); the
    tensors of torchao and quanto dequantize themselves.

    Raises:
        NotHFError: The weights cannot be dequantized; the model is as it was.
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
    """Dequantize tensors whose class packs them, in plain modules; returns whether there were any."""
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
    """Whether a tensor's class packs its values: it has a `dequantize` of its own."""
    return type(parameter).dequantize is not torch.Tensor.dequantize


def _packed_for_cpu(parameter: torch.Tensor) -> bool:
    """Whether bitsandbytes has packed 4-bit weights for its CPU kernel: `dequantize` would misread them (0.50)."""
    return bool(getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False))
