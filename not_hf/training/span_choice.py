"""Choose where to cut: rank spans of layers by what training them on a text would gain."""

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

_MAX_ENTRIES = 2**16  # of a tensor that are sampled, approximately
_COLUMNS = ("input_ids", "attention_mask", "position_ids", "labels")


@dataclass(frozen=True)
class RankedSpan:
    """A span of layers, as for `DonorModel.from_base`, and its score (nats per unit of learning rate)."""

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
    """Rank all spans of k layers of a causal LM by what training them on a text would gain, without training.

    AdamW changes a weight by about E[g] / sqrt(E[g^2]) times the learning rate, where g is its gradient in a batch.
    So the loss falls, to first order and per unit of learning rate, by E[g]^2 / sqrt(E[g^2]) summed over the weights.
    This is the score, in nats. E[g]^2 is estimated from pairs of different batches, so that noise does not count as
    gain. The time of a training step, which depends on the position of the span, is not considered.

    Take it as a hint: on both texts that were tried, the scores correlated with the results of training (rank
    correlations 0.6 and 0.8), but the best score was not the best span. See `benchmarks/results/spans.md`.

    The cost is one forward and backward pass per batch, without dropout. Besides activations it takes little memory:
    the gradient of one tensor at a time, of which a sample is kept.

    Args:
        model: A causal LM, which is left unchanged, or a folder or Hub ID. Organs are switched off: spans are of the
            model's own layers.
        data: As for Trainer's `train_dataset`: rows with `input_ids` and, if they differ, `labels`. The rows of a
            batch have the same length, as `pack` makes them. They are spread over a dataset that has a length, and
            taken from the start of one that has none.
        k: Number of layers in a span.
        num_batches: Number of batches to average over, at least 2; fewer if `data` ends.
        batch_size: Rows per batch.

    Returns:
        All spans, best first.

    Raises:
        NotHFError: An argument is out of range, `data` has no usable rows, or the gradient is zero or not finite.
        UnsupportedArchitectureError: Not a causal LM, its layers are not found, or it is quantized or offloaded.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from not_hf import DonorModel, choose_span
        >>> shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4))
        >>> blocks = [{"input_ids": [*range(n, n + 9)]} for n in range(8)]
        >>> spans = choose_span(base, blocks, k=2)
        >>> sorted(span.layers for span in spans)
        [(0, 2), (1, 3), (2, 4)]
        >>> donor = DonorModel.from_base(base, layers=spans[0].layers, mode="replace")
    """
    if not isinstance(model, nn.Module):
        loaded: Any = AutoModelForCausalLM.from_pretrained(model)
        model = cast(PreTrainedModel, loaded.to("cuda" if torch.cuda.is_available() else "cpu"))
    if is_encoder(model.config):
        raise UnsupportedArchitectureError(f"model_type {model.config.model_type!r} is an encoder; use a causal LM")
    if is_quantized(model):
        raise UnsupportedArchitectureError(
            f"weights in {quantization_name(model)} take no gradient; load the model without quantization"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedArchitectureError("offloaded weights take no gradient; load the model without offloading")
    if num_batches < 2 or batch_size < 1:
        raise NotHFError(
            f"num_batches must be at least 2 and batch_size at least 1, got {num_batches} and {batch_size}"
        )
    with model.disable_donors() if isinstance(model, Recipient) else contextlib.nullcontext():
        layers = find_stack(model).layers
        if not 1 <= k <= len(layers):
            raise NotHFError(f"k must be between 1 and {len(layers)}, the number of layers, got {k}")
        batches = _batches(data, num_batches, batch_size)
        scores = _layer_scores(model, layers, batches)
    spans = [RankedSpan((i, i + k), math.fsum(scores[i : i + k])) for i in range(len(scores) - k + 1)]
    return sorted(spans, key=lambda span: span.score, reverse=True)


def _layer_scores(
    model: PreTrainedModel, layers: nn.ModuleList, batches: Sequence[dict[str, torch.Tensor]]
) -> list[float]:
    """Compute what each layer adds to the score of a span."""
    # sums of g and g^2 over batches, (entries,) each
    moments: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.flatten()[:: _stride(parameter)].float()
        parameter.grad = None  # now, so that only one gradient is in memory
        if parameter not in moments:
            moments[parameter] = (torch.zeros_like(gradient), torch.zeros_like(gradient))
        total, squares = moments[parameter]
        total += gradient
        squares += gradient.square()

    with _only_layers_trainable(model, layers), contextlib.ExitStack() as hooks, torch.enable_grad():
        for parameter in layers.parameters():
            hooks.callback(parameter.register_post_accumulate_grad_hook(cast(Any, add)).remove)
        for batch in batches:
            inputs = {key: tensor.to(model.device) for key, tensor in batch.items()}
            model(**inputs, use_cache=False).loss.backward()

    def score(parameter: nn.Parameter) -> float:
        total, squares = moments[parameter]
        num = len(batches)
        squared_mean = (total.square() - squares) / (num * (num - 1))  # E[g]^2 without bias: over pairs of batches
        gains = squared_mean / (squares / num).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return float(gains.double().sum()) * _stride(parameter)

    scores = [math.fsum(score(each) for each in layer.parameters() if each in moments) for layer in layers]
    if not any(scores) or not all(map(math.isfinite, scores)):
        raise NotHFError(
            "the gradient is zero or not finite; check the labels, and load the model in bfloat16 or float32"
        )
    return scores


def _stride(parameter: torch.Tensor) -> int:
    """Distance between sampled entries: coprime to the length of a row, so that all columns are sampled."""
    stride = max(1, parameter.numel() // _MAX_ENTRIES)
    while math.gcd(stride, *parameter.shape[-1:]) > 1:
        stride += 1
    return stride


@contextlib.contextmanager
def _only_layers_trainable(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Turn dropout off and compute gradients for the layers only; restores modes, flags and gradients."""
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
    """Make batches of rows; chosen without random numbers, so that no generator advances."""
    wanted = num_batches * batch_size
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        wanted = min(wanted, len(data))
        rows = [data[n * len(data) // wanted] for n in range(wanted)]
    else:
        rows = list(itertools.islice(data, wanted))
    if not rows or not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        raise NotHFError("data has no rows with input_ids; use not_hf.pack to make them")
    rows = [{"labels": row["input_ids"], **{key: row[key] for key in _COLUMNS if key in row}} for row in rows]
    batches = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        lengths = sorted({len(row[key]) for row in batch for key in row})
        if len(lengths) > 1:
            raise NotHFError(
                f"a batch has rows of {lengths[0]} and {lengths[-1]} tokens; use not_hf.pack, or batch_size=1"
            )
        batches.append(default_data_collator(batch))
    if len(batches) < 2:
        raise NotHFError(
            f"data fills fewer than 2 batches of {batch_size} rows; use more rows, or a smaller batch_size"
        )
    return batches
