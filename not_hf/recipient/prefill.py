"""A prompt that several organs share: below the first layer that organs touch, it is read once."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel

from not_hf.architecture.adapters import adapter_state, is_adapted
from not_hf.architecture.partial_forward import PartialForward
from not_hf.architecture.stack import Stack
from not_hf.architecture.upstream import tensor_state
from not_hf.errors import NotHFError, UnsupportedArchitectureError

# Options of `generate` with which its first forward pass does not read the prompt as it is, whole and alone
_READ_OTHERWISE = (
    *("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
    *("prefill_chunk_size", "token_healing"),
)


@dataclass(frozen=True)
class Prefill:
    """What a model computes of a prompt below a layer; made by `model.prefill`, used by `model.generate`.

    Args:
        input_ids: Tokens of the prompt, `(batch, seq)`.
        attention_mask: 1 for tokens, 0 for padding, `(batch, seq)`.
        depth: Number of layers that have run.
        hidden: Hidden states behind them, `(batch, seq, hidden)`; `None` at depth 0.
        cache: Keys and values, and states, of these layers.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    depth: int
    hidden: torch.Tensor | None
    cache: DynamicCache
    _forward: PartialForward | None
    _below: _Below

    @classmethod
    def of(cls, stack: Stack, depth: int, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Prefill:
        """Read a prompt with the first layers of a model. Arguments and errors as in `Recipient.prefill`."""
        model: PreTrainedModel = stack.model  # type: ignore[assignment]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if depth == 0:
            return cls(input_ids, mask, 0, None, cache, None, _Below())
        forward, inputs = PartialForward(stack, depth), {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in inspect.signature(model.forward).parameters:  # as `generate` counts them
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        with _noting_calls(stack.outside) as beside:
            hidden = forward.run_to(depth, inputs, cache)
        if len(cache.layers) < depth:
            raise UnsupportedArchitectureError(
                f"model_type {model.config.model_type!r} has no cache that can be shared"
            )
        return cls(input_ids, mask, depth, hidden, cache, forward, _Below.of(stack, depth, tuple(beside)))

    def require_current(self, stack: Stack) -> None:
        """Check that the model still computes what it did below the depth.

        Raises:
            NotHFError: It does not.
        """
        if self._forward is not None and self._forward.model is not stack.model:
            raise NotHFError("the prefill is of another model; call prefill() of this one")
        if _Below.of(stack, self.depth, self._below.beside) != self._below:
            raise NotHFError(
                f"the prefill holds what {self.depth} layers computed, and organs, adapters or weights among them, or "
                "the embeddings, have changed since; call prefill() again, with depth= below what changes"
            )

    def require_same_reading(self, model: PreTrainedModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check that the first forward pass of `generate` will read the prompt as it is, whole and alone.

        Args:
            model: The model.
            args: Arguments of `generate`.
            kwargs: Its named arguments.

        Raises:
            NotHFError: It will not, because of an option among them or in the generation config.
        """
        given = inspect.signature(GenerationMixin.generate).bind_partial(model, *args, **kwargs).arguments
        options = {**given.pop("kwargs", {}), **given}
        configs = (options.get("generation_config"), model.generation_config)
        for name in _READ_OTHERWISE:
            values = [options[name]] if name in options else [getattr(config, name, None) for config in configs]
            chosen = next((value for value in values if value is not None), False)
            if chosen is False or (name == "prefill_chunk_size" and chosen >= self.input_ids.shape[1]):
                continue
            raise NotHFError(
                f"with {name}, generate() does not begin with the prompt as prefill() has read it, whole and alone; "
                f"pass {name}=None, or leave out prefill"
            )

    def run(self, call: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the first forward pass of `generate`, from the depth on.

        Args:
            call: The forward pass of the model.
            kwargs: Its arguments.

        Raises:
            NotHFError: They are of another prompt, or have a cache of another kind.
        """
        ids = kwargs.get("input_ids")
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise NotHFError(f"a prefill needs a DynamicCache, not a {type(cache).__name__}; leave out the argument")
        times = 0 if ids is None else len(ids) // len(self.input_ids)  # beams, or several answers
        mask = kwargs.get("attention_mask")
        for given, own in ((ids, self.input_ids), (mask, self.attention_mask)):
            expected = own.repeat_interleave(times, 0)
            if given is not None and given.ndim == 2 and torch.equal(given, expected.to(given.device)):
                continue
            if given is not None or own is self.input_ids:
                raise NotHFError("generate() was given another prompt than prefill(); give both the same inputs")
        if self._forward is None or self.hidden is None:
            return call(**kwargs)
        with self._forward.running_from(self.depth, self.hidden.repeat_interleave(times, 0)):
            output = call(**kwargs)
        if cache is not None:
            read = copy.deepcopy(self.cache)
            if times > 1:
                read.batch_repeat_interleave(times)
            cache.layers[: self.depth] = read.layers[: self.depth]
        return output


@dataclass(frozen=True)
class _Below:
    """What hidden states at a depth depend on: modules, the state of their tensors, and which adapters act in them.

    Args:
        beside: Paths of modules beside the layers that run before them.
    """

    beside: tuple[str, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    states: tuple[tuple[int, int, int], ...] = ()
    adapters: tuple[str, ...] = ()
    tensors: tuple[torch.Tensor, ...] = field(default=(), compare=False)  # so that no other one takes a state

    @classmethod
    def of(cls, stack: Stack, depth: int, beside: tuple[str, ...]) -> _Below:
        if depth == 0:
            return cls()
        modules = (*map(stack.model.get_submodule, beside), *list(stack.layers)[:depth])
        tensors = tuple(each for module in modules for each in (*module.parameters(), *module.buffers()))
        tensors = tuple(each for each in tensors if not each.is_meta)  # accelerate loads offloaded ones for each pass
        inner = (each for module in modules for each in module.modules())
        adapters = tuple(map(adapter_state, filter(is_adapted, inner)))
        return cls(beside, modules, tuple(map(tensor_state, tensors)), adapters, tensors)


@contextlib.contextmanager
def _noting_calls(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield a list to which the names of these modules are added when they are called."""
    called: list[str] = []
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            note = functools.partial(lambda name, *_: called.append(name), name)
            hooks.callback(module.register_forward_pre_hook(note).remove)
        yield called


# The prefill with which the forward pass that comes next in this context starts
_next: ContextVar[tuple[PreTrainedModel, Prefill] | None] = ContextVar("_next", default=None)


def starting_from(model: PreTrainedModel, prefill: Prefill, generate: Callable[[], Any]) -> Any:
    """Call `generate` so that the first forward pass of `model` in it starts from a prefill."""
    token = _next.set((model, prefill))
    try:
        return generate()
    finally:
        _next.reset(token)


def take_next(model: PreTrainedModel) -> Prefill | None:
    """Return the prefill with which the next forward pass of a model starts, once; `None` if there is none."""
    found = _next.get()
    if found is None or found[0] is not model:
        return None
    _next.set(None)
    return found[1]
