"""Run part of a forward pass: up to a layer, or on from a layer with hidden states that were computed before.

The model itself runs, with its own masks, positions, norms and head; layers that are not needed are replaced for the
duration of the pass. So nothing has to be known about an architecture except the form in which its layers return
hidden states, which is read off the live model and checked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from not_hf.architecture.devices import input_device
from not_hf.architecture.layers import eval_mode
from not_hf.architecture.releases import cache_argument
from not_hf.architecture.stack import Stack, layers_config
from not_hf.architecture.upstream import swapped_layers
from not_hf.errors import UnsupportedArchitectureError


class SkippedLayer(nn.Module):
    """Stands in for a layer that is not run. Returns `hidden` if set, else its input, in the form the layer would."""

    def __init__(self, layer: nn.Module, tuple_length: int | None) -> None:
        """Stand in for `layer`, which returns a tuple of that length, or a tensor when `None`."""
        super().__init__()
        plain = {key: value for key, value in vars(layer).items() if isinstance(value, (bool, int, str))}
        vars(self).update(plain)  # a native model may ask for a layer's type
        self.tuple_length = tuple_length
        self.hidden: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return hidden states, `(batch, seq, hidden)`."""
        out = hidden_states if self.hidden is None else self.hidden
        return out if self.tuple_length is None else (out, *[None] * (self.tuple_length - 1))


def router_loss_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of a model that turn on the loss of its routers, which needs the router logits of all layers."""
    configs = (model.config, layers_config(model.config))
    return [config for config in configs if getattr(config, "output_router_logits", False)]


class _EntryReached(Exception):
    """Ends a forward pass at the entry of a layer."""


class PartialForward:
    """Runs parts of a model.

    Args:
        stack: The layers of a causal or masked LM. They may change between calls.
        entry: Number of the layer at which passes are to start; by default a layer in the middle is tried.

    Raises:
        UnsupportedArchitectureError: The layers of the model pass on more than hidden states.
    """

    def __init__(self, stack: Stack, entry: int | None = None) -> None:
        self.stack = stack
        self.model: PreTrainedModel = stack.model  # type: ignore[assignment]
        self._tuple_length: int | None = None
        self._probe(entry)

    @torch.no_grad()
    def run_to(self, n: int, inputs: Mapping[str, Any], cache: Cache | None = None) -> torch.Tensor:
        """Compute the hidden states at the entry of a layer, without gradients.

        Args:
            n: Number of the layer; the number of layers: behind the last one.
            inputs: Arguments of the model's `forward`, without labels.
            cache: Is filled by the layers below.

        Returns:
            Hidden states, `(batch, seq, hidden)`.
        """
        options = {cache_argument(self.model): cache, "use_cache": cache is not None}
        found: list[torch.Tensor] = []

        def capture(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _EntryReached

        def capture_output(layer: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _EntryReached

        layers = self.stack.layers
        if n == len(layers):
            handle = layers[-1].register_forward_hook(capture_output)
        else:
            handle = layers[n].register_forward_pre_hook(capture, with_kwargs=True)
        try:
            self.model(**inputs, **options)
        except _EntryReached:
            pass
        finally:
            handle.remove()
        return found[0]

    @contextlib.contextmanager
    def running_from(self, n: int, hidden: torch.Tensor) -> Iterator[None]:
        """Make passes in the block, of the model or a wrapper of it, start at layer `n`, without a router loss.

        Args:
            n: At least 1; the number of layers leaves norm and head only.
            hidden: Input of layer `n`, `(batch, seq, hidden)`.
        """
        layers = list(self.stack.layers)
        skipped = [SkippedLayer(layer, self._tuple_length) for layer in layers[:n]]
        skipped[-1].hidden = hidden
        configs = router_loss_configs(self.model)
        try:
            for config in configs:
                config.output_router_logits = False
            with swapped_layers(self.stack.layers, [*skipped, *layers[n:]]):
                yield
        finally:
            for config in configs:
                config.output_router_logits = True

    @contextlib.contextmanager
    def capturing(self, entries: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Yield a dict into which a forward pass in the block puts the input of these layers, by their numbers.

        Args:
            entries: Numbers of layers; the number of layers stands for the output of the last. Each value is
                `(batch, seq, hidden)`.
        """
        found: dict[int, torch.Tensor] = {}

        def capture(n: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[n] = args[0] if args else kwargs["hidden_states"]

        def capture_output(layer: nn.Module, args: Any, output: Any) -> None:
            found[len(layers)] = output[0] if isinstance(output, tuple) else output

        layers = self.stack.layers
        with contextlib.ExitStack() as hooks:
            for n in entries:
                if n == len(layers):
                    handle = layers[-1].register_forward_hook(capture_output)
                else:
                    handle = layers[n].register_forward_pre_hook(functools.partial(capture, n), with_kwargs=True)
                hooks.callback(handle.remove)
            yield found

    @contextlib.contextmanager
    def capturing_last(self) -> Iterator[list[torch.Tensor]]:
        """Yield a list to which each forward pass in the block adds its last output, `(batch, seq, hidden)`."""
        found: list[torch.Tensor] = []

        def capture(layer: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self.stack.layers[-1].register_forward_hook(capture)
        try:
            yield found
        finally:
            handle.remove()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits, `(tokens, vocab)`, with the model's own norm and head.

        Args:
            hidden: Output of the last layer, `(tokens, hidden)`; no more tokens than the model's context.
        """
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with self.running_from(len(self.stack.layers), hidden[None]):
            return self.model(input_ids=ids, use_cache=False).logits.squeeze(0)

    @torch.no_grad()
    def _probe(self, entry: int | None) -> None:
        """Find out what layers return, and check that a pass in two parts equals a whole one."""
        model, layers = self.model, self.stack.layers
        ids = torch.arange(4, device=input_device(model))[None]  # (batch=1, seq=4)
        returned: list[Any] = []
        handle = layers[0].register_forward_hook(lambda layer, args, output: returned.append(output))
        try:
            with eval_mode(model):
                whole = model(input_ids=ids, use_cache=False).logits
                self._tuple_length = len(returned[0]) if isinstance(returned[0], tuple) else None
                n = entry or max(1, len(layers) // 2)
                hidden = self.run_to(n, {"input_ids": ids}) if n < len(layers) else None
                if hidden is not None:
                    with self.running_from(n, hidden):
                        parts = model(input_ids=ids, use_cache=False).logits
                    torch.testing.assert_close(parts, whole)
                with self.capturing_last() as last:
                    model(input_ids=ids, use_cache=False)
                torch.testing.assert_close(self.head(last[0][0])[None], whole)
        except (AssertionError, LookupError) as error:
            kind = f"model_type {model.config.model_type!r}"
            raise UnsupportedArchitectureError(
                f"{kind} cannot run in parts: its layers pass on more than hidden states; use transformers.Trainer"
            ) from error
        finally:
            handle.remove()
