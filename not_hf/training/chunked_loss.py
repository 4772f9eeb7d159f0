"""Cross-entropy of a causal LM without the logits of all tokens at once.

The head is frozen, so only the loss and its gradient with respect to the output of the last layer are needed. Both are
computed together, a chunk of tokens at a time, and the logits of a chunk are dropped before the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Head = Callable[[torch.Tensor], torch.Tensor]  # (tokens, hidden) -> logits, (tokens, vocab)

IGNORE_INDEX = -100


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts, `(batch, seq)`, of those of the tokens themselves."""
    return functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def summed_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    chunk: int,
    base_hidden: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """Compute the negative log-likelihood of tokens (nats).

    Args:
        hidden: Output of the last layer, `(batch, seq, hidden)`.
        labels: The token that each position predicts, `(batch, seq)`; -100 is ignored.
        head: Norm and head of the model, with frozen parameters.
        chunk: Tokens at a time.
        base_hidden: Output of the base's last layer, like `hidden`; for the KL term.
        kl_weight: Factor of KL(base ‖ model) of the predictions (nats), which is added to the loss.

    Returns:
        The sum over tokens, and their number.
    """
    counted = labels != IGNORE_INDEX  # (batch, seq)
    base = None if base_hidden is None else base_hidden[counted]
    loss = _SummedLoss.apply(hidden[counted], labels[counted], base, head, chunk, kl_weight)
    return loss, int(counted.sum())


class _SummedLoss(torch.autograd.Function):
    """The summed loss; its gradient is computed in the forward pass, while the logits of a chunk are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # (tokens, hidden)
        labels: torch.Tensor,  # (tokens,)
        base: torch.Tensor | None,  # (tokens, hidden)
        head: Head,
        chunk: int,
        kl_weight: float,
    ) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(needs_gradient):
                states = hidden[part].detach().requires_grad_(needs_gradient)
                logits = head(states)  # (chunk, vocab)
            predicted = functional.log_softmax(logits.detach().float(), -1)
            total += functional.nll_loss(predicted, labels[part], reduction="sum", ignore_index=IGNORE_INDEX)
            expected = None
            if base is not None:
                expected = functional.log_softmax(head(base[part]).float(), -1)
                total += kl_weight * functional.kl_div(predicted, expected, reduction="sum", log_target=True)
            if gradient is not None:  # with respect to logits: predicted minus target probabilities
                error = predicted.exp_()
                if expected is not None:
                    error.mul_(1 + kl_weight).sub_(expected.exp_(), alpha=kl_weight)
                error.scatter_add_(-1, labels[part, None], error.new_full((len(error), 1), -1.0))
                (gradient[part],) = torch.autograd.grad(logits, states, error.to(logits.dtype))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, output_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * output_gradient).to(gradient.dtype), None, None, None, None, None
