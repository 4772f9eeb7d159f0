"""A native forward pass in parts: up to a layer, and on from a layer with hidden states that were computed before.

The model itself runs, with its own masks, positions, norms and head; only layers that need not be run are replaced for
the moment. So there is nothing to know about an architecture but in what form its layers return hidden states, which
`probe` looks up in the live model, and checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.layers import eval_mode
from not_hf.architecture.stack import Stack
from not_hf.architecture.upstream import swapped_layers
from not_hf.errors import UnsupportedArchitectureError


class Skipped(nn.Module):
    """Stands where a layer is not run. Returns `hidden` if it has some, else what it is given, as the layer would."""

    def __init__(self, size: int | None) -> None:
        """`size`: of the tuple that the layer returns; `None` when it returns a tensor."""
        super().__init__()
        self.size = size
        self.hidden: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states, `(batch, seq, hidden)`."""
        out = hidden_states if self.hidden is None else self.hidden
        return out if self.size is None else (out, *[None] * (self.size - 1))


class _Arrived(Exception):
    """Ends a forward pass that has come as far as it was meant to."""


class Partway:
    """Runs parts of a model.

    Args:
        stack: The layers of a causal or masked LM, as they stand whenever a part is run.

    Raises:
        UnsupportedArchitectureError: The model carries more from layer to layer than hidden states.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.model: PreTrainedModel = stack.model  # type: ignore[assignment]
        self._size: int | None = None
        self._probe()

    @torch.no_grad()
    def run_to(self, n: int, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states at the entry of layer `n`, `(batch, seq, hidden)`; without gradients.

        Args:
            n: Below the number of layers.
            inputs: What the model's `forward` takes, without labels.
        """
        found: list[torch.Tensor] = []

        def arrive(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Arrived

        handle = self.stack.layers[n].register_forward_pre_hook(arrive, with_kwargs=True)
        try:
            self.model(**inputs, use_cache=False)
        except _Arrived:
            pass
        finally:
            handle.remove()
        return found[0]

    @contextlib.contextmanager
    def running_from(self, n: int, hidden: torch.Tensor) -> Iterator[None]:
        """Inside the block a forward pass of the model, however it is wrapped, starts at layer `n`.

        Args:
            n: At least 1; the number of layers leaves norm and head.
            hidden: What layer `n` is given, `(batch, seq, hidden)`.
        """
        layers = self.stack.layers
        skipped = [Skipped(self._size) for _ in range(n)]
        skipped[-1].hidden = hidden
        with swapped_layers(layers, [*skipped, *list(layers)[n:]]):
            yield

    @contextlib.contextmanager
    def capturing_last(self) -> Iterator[list[torch.Tensor]]:
        """Gives a list that takes up what the last layer returns, `(batch, seq, hidden)`, in each forward pass."""
        found: list[torch.Tensor] = []

        def capture(layer: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self.stack.layers[-1].register_forward_hook(capture)
        try:
            yield found
        finally:
            handle.remove()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits by the model's own norm and head, `(tokens, vocab)`.

        Args:
            hidden: What the last layer returned, `(tokens, hidden)`; at most as many as the model's context has.
        """
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self.running_from(len(self.stack.layers), hidden[None]):
            return self.model(input_ids=ids, use_cache=False).logits.squeeze(0)

    @torch.no_grad()
    def _probe(self) -> None:
        """Look up what layers return, and check that a pass in two parts gives what it gives in one."""
        model, layers = self.model, self.stack.layers
        ids = torch.arange(4, device=model.device)[None]  # (batch=1, seq=4)
        returned: list[Any] = []
        handle = layers[0].register_forward_hook(lambda layer, args, output: returned.append(output))
        try:
            with eval_mode(model):
                whole = model(input_ids=ids, use_cache=False).logits
                self._size = len(returned[0]) if isinstance(returned[0], tuple) else None
                n = max(1, len(layers) // 2)
                hidden = self.run_to(n, {"input_ids": ids}) if n < len(layers) else None
                if hidden is not None:
                    with self.running_from(n, hidden):
                        parts = model(input_ids=ids, use_cache=False).logits
                    torch.testing.assert_close(parts, whole)
                with self.capturing_last() as last:
                    model(input_ids=ids, use_cache=False)
                torch.testing.assert_close(self.head(last[0][0])[None], whole)
        except AssertionError as error:
            kind = f"model_type {model.config.model_type!r}"
            raise UnsupportedArchitectureError(
                f"{kind} does not run in parts: its layers hand on more than hidden states; use transformers.Trainer"
            ) from error
        finally:
            handle.remove()
