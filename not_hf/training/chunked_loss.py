"""Cross-entropy of a causal LM without the logits of all tokens at once.

The head is frozen, so all that is wanted of it is the loss and its gradient with respect to what the last layer
returned. Both are worked out together, a few tokens at a time, and the logits of those are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Head = Callable[[torch.Tensor], torch.Tensor]  # (tokens, hidden) -> logits, (tokens, vocab)

IGNORED = -100


def summed_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    chunk: int,
    base_hidden: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood of tokens (nats), summed, and their number.

    Args:
        hidden: What the last layer returned, `(batch, seq, hidden)`.
        labels: The token that each position is to predict, `(batch, seq)`; -100 is left out.
        head: Its parameters are not trained.
        chunk: Tokens at a time.
        base_hidden: What the last layer of the base returned, like `hidden`; for the KL term.
        kl_weight: Added is this times KL(base ‖ model) of the predictions, in nats.
    """
    counted = labels != IGNORED  # (batch, seq)
    base = None if base_hidden is None else base_hidden[counted]
    loss = _SummedLoss.apply(hidden[counted], labels[counted], base, head, chunk, kl_weight)
    return loss, int(counted.sum())


class _SummedLoss(torch.autograd.Function):
    """The loss, its gradient already worked out on the way."""

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
        learns = ctx.needs_input_grad[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if learns else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(learns):
                states = hidden[part].detach().requires_grad_(learns)
                logits = head(states)  # (chunk, vocab)
            found = functional.log_softmax(logits.detach().float(), -1)
            total += functional.nll_loss(found, labels[part], reduction="sum", ignore_index=IGNORED)
            expected = None
            if base is not None:
                expected = functional.log_softmax(head(base[part]).float(), -1)
                total += kl_weight * functional.kl_div(found, expected, reduction="sum", log_target=True)
            if gradient is not None:  # of the loss with respect to logits: what is predicted less what should be
                error = found.exp_()
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
