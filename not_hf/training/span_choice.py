"""Where to cut: which consecutive layers would gain most from being trained on a text."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, default_data_collator

from not_hf.architecture.layers import eval_mode
from not_hf.architecture.quantization import is_quantized, quantization_name
from not_hf.architecture.stack import find_stack, is_encoder
from not_hf.errors import NotHFError, UnsupportedArchitectureError
from not_hf.recipient.mixin import Recipient

_MOST_ENTRIES = 2**16  # about so many of a tensor are looked at
_COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class RankedSpan:
    """A span of layers, as `DonorModel.from_base` takes it, and what speaks for it."""

    layers: tuple[int, int]
    score: float


def choose_span(
    model: PreTrainedModel | str | os.PathLike[str],
    data: Iterable[Mapping[str, Any]],
    k: int,
    *,
    num_batches: int = 20,
    batch_size: int = 2,
) -> list[RankedSpan]:
    """Rank all spans of k layers of a causal LM by what training them on a text would gain; nothing is trained.

    AdamW moves a weight by about its rate times E[g] / sqrt(E[g^2]), where g is its gradient in a batch. So the loss
    on text of the kind falls, to first order and per unit of rate, by E[g]^2 / sqrt(E[g^2]) summed over the weights.
    This is the score, in nats. E[g]^2 is estimated from pairs of different batches, so that noise does not count as
    gain. How long a step takes, which depends on where the span stands, is no part of it.

    A hint, no oracle: it went with what training gave on both texts that it was tried on (rank correlations 0.6 and
    0.8), but its first choice was not the best span. See "Where to cut" in `benchmarks/README.md`.

    It costs one forward and backward pass per batch through the unchanged model, without dropout, and little memory
    besides the activations: the gradient of one tensor at a time, of which a sample is kept.

    Args:
        model: A model, given back as it was; if it carries organs, its own layers are ranked, with the organs off. Or
            a folder or Hub ID.
        data: What Trainer takes as `train_dataset`: rows with `input_ids` and, where they are not the same, `labels`.
            Rows of a batch are equally long, as `not_hf.data.pack` makes them. They are taken from all over a dataset
            that has a length, else from its start.
        k: Layers in a span.
        num_batches: Batches to average over, at least 2; fewer if `data` ends.
        batch_size: Rows in a batch.

    Returns:
        Every span, best first.

    Raises:
        NotHFError: An argument is out of range, `data` holds no usable rows, or the gradient is zero or not finite.
        UnsupportedArchitectureError: Not a causal LM, its layers are not found, or it is quantized or offloaded.
    """
    if not isinstance(model, nn.Module):
        loaded: Any = AutoModelForCausalLM.from_pretrained(model)
        model = cast(PreTrainedModel, loaded.to("cuda" if torch.cuda.is_available() else "cpu"))
    if is_encoder(model.config):
        raise UnsupportedArchitectureError(f"model_type {model.config.model_type!r} is an encoder; give a causal LM")
    if is_quantized(model):
        raise UnsupportedArchitectureError(
            f"weights in {quantization_name(model)} take no gradient; load the model without quantization"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedArchitectureError("offloaded weights take no gradient; load the model without offloading")
    if num_batches < 2 or batch_size < 1:
        raise NotHFError(f"num_batches is {num_batches} and batch_size {batch_size}; choose at least 2 and 1")
    with model.disable_donors() if isinstance(model, Recipient) else contextlib.nullcontext():
        layers = find_stack(model).layers
        if not 1 <= k <= len(layers):
            raise NotHFError(f"k is {k}; choose 1 to {len(layers)}, the number of layers")
        batches = _batches(data, num_batches, batch_size)
        scores = _layer_scores(model, layers, batches)
    spans = [RankedSpan((i, i + k), math.fsum(scores[i : i + k])) for i in range(len(scores) - k + 1)]
    return sorted(spans, key=lambda span: span.score, reverse=True)


def _layer_scores(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Sequence[dict[str, torch.Tensor]]
) -> list[float]:
    """Each layer's share of a span's score."""
    moments: dict[
        nn.Parameter, tuple[torch.Tensor, torch.Tensor]
    ] = {}  # sums of g and g^2 over batches, (entries,) each

    def add(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.flatten()[:: _stride(parameter)].float()
        parameter.grad = None  # at once, so that no two tensors' gradients are held
        if parameter not in moments:
            moments[parameter] = (torch.zeros_like(gradient), torch.zeros_like(gradient))
        total, squares = moments[parameter]
        total += gradient
        squares += gradient.square()

    with _only_layers_learn(model, layers), contextlib.ExitStack() as hooks, torch.enable_grad():
        for parameter in layers.parameters():
            hooks.callback(parameter.register_post_accumulate_grad_hook(cast(Any, add)).remove)
        for batch in batches:
            inputs = {key: tensor.to(model.device) for key, tensor in batch.items()}
            model(**inputs, use_cache=False).loss.backward()

    def score(parameter: nn.Parameter) -> float:
        total, squares = moments[parameter]
        num = len(batches)
        squared_mean = (total.square() - squares) / (
            num * (num - 1)
        )  # E[g]^2 without bias: batches paired with others
        gains = squared_mean / (squares / num).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return float(gains.double().sum()) * _stride(parameter)

    scores = [math.fsum(score(each) for each in layer.parameters() if each in moments) for layer in layers]
    if not any(scores) or not all(map(math.isfinite, scores)):
        raise NotHFError("the gradient is zero or not finite; give labels, and a model in bfloat16 or float32")
    return scores


def _stride(parameter: torch.Tensor) -> int:
    """How far apart the entries looked at are: coprime to a row's length, so that every column has its share."""
    stride = max(1, parameter.numel() // _MOST_ENTRIES)
    while math.gcd(stride, *parameter.shape[-1:]) > 1:
        stride += 1
    return stride


@contextlib.contextmanager
def _only_layers_learn(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """No dropout, and gradients for the layers alone; all is put back, gradients that were there too."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for layer in layers:
            layer.requires_grad_(True)
        for parameter, _, _ in before:
            parameter.grad = None
        with eval_mode(model):
            yield
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _batches(data: Any, num_batches: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Rows as tensors; chosen without a random number, so that no generator moves."""
    wanted = num_batches * batch_size
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        wanted = min(wanted, len(data))
        rows = [data[n * len(data) // wanted] for n in range(wanted)]
    else:
        rows = list(itertools.islice(data, wanted))
    if not rows or not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        raise NotHFError("data holds no rows with input_ids; give a dataset as not_hf.data.pack makes it")
    rows = [{"labels": row["input_ids"], **{key: row[key] for key in _COLUMNS if key in row}} for row in rows]
    batches = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        lengths = sorted({len(row[key]) for row in batch for key in row})
        if len(lengths) > 1:
            raise NotHFError(
                f"a batch has rows of {lengths[0]} and {lengths[-1]} tokens; pack them, or use batch_size=1"
            )
        batches.append(default_data_collator(batch))
    if len(batches) < 2:
        raise NotHFError(
            f"data fills one batch of {batch_size} rows; give more, or a smaller batch_size, for at least 2"
        )
    return batches
