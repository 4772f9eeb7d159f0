"""The key of a prefix: a digest of all that hidden states at the entry depend on, other than the tokens.

It is asked for at each batch, so only what has changed is digested again. torch counts the changes of a tensor in
place, and any other change gives it another address. Only what is written through `.data` escapes both: `forget` makes
the next key a digest of every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.adapters import adapter_state, is_adapted
from not_hf.architecture.differences import describe
from not_hf.architecture.upstream import foreign_hooks, global_hooks, implementations, tables_of, tensor_state

# By the state of a tensor, as `tensor_state` gives it; with the tensor, so that no other one takes that state
_Digests = dict[tuple[int, int, int], tuple[torch.Tensor, bytes]]


class PrefixKey:
    """Follows a model below the entry.

    Args:
        model: The model.
        below: The modules that hidden states at the entry depend on.
        around: The modules that contain the stack, outermost first; what they own themselves counts too.
        about: What else the hidden states depend on, as JSON.
    """

    def __init__(
        self, model: PreTrainedModel, below: Sequence[nn.Module], around: Sequence[nn.Module], about: Mapping[str, Any]
    ) -> None:
        self._model, self._below, self._around, self._about = model, below, around, about
        self.forget()

    def forget(self) -> None:
        """Have the next key computed from every byte."""
        self._digests: _Digests = {}
        self._find_modules()

    def current(self) -> str:
        """Return the key of the model as it is now; the name of a folder."""
        if not self._digests or self._has_changed():
            self._find_modules()
            known, self._digests = self._digests, {}  # empty until the key is computed, should that be interrupted
            self._key = self._compute(known)
        return self._key

    def foreign_hook(self) -> str | None:
        """Describe a hook that may change hidden states at the entry in a way that cannot be followed, if any."""
        if found := global_hooks():
            return f"{found[0]} on every module"
        outer = len(self._around)
        for n, module in enumerate(self._modules):
            if found := foreign_hooks(module, before_only=n < outer, keeps_forward=n > 0):
                name = next((name for name, each in self._model.named_modules() if each is module), "")
                return f"{found[0]} on {name or type(module).__name__}"
        return None

    def _find_modules(self) -> None:
        """List what is looked at for each batch, and its state now."""
        self._modules = [*self._around, *(module for each in self._below for module in each.modules())]
        self._adapted = list(filter(is_adapted, self._modules))
        self._tables = [table for module in self._modules for table in tables_of(module)]
        self._contents = list(chain.from_iterable(map(dict.values, self._tables)))
        self._watched = [each for each in self._contents if isinstance(each, torch.Tensor)]
        self._state = self._look()

    def _has_changed(self) -> bool:
        """Whether anything has changed that can be noticed without reading weights."""
        contents = list(chain.from_iterable(map(dict.values, self._tables)))
        is_same = len(contents) == len(self._contents) and all(map(is_, contents, self._contents))
        return not is_same or self._look() != self._state

    def _look(self) -> list[Any]:
        adapters = map(adapter_state, self._adapted)
        return [implementations(self._model.config), *adapters, *map(tensor_state, self._watched)]

    def _compute(self, known: _Digests) -> str:
        about = {
            **self._about,
            **implementations(self._model.config),
            "modules": [[_forward_of(module), type(module).__qualname__] for module in self._modules],
            "attributes": [sorted(describe(module).attributes.items()) for module in self._below],
            "adapters": list(map(adapter_state, self._adapted)),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        digests: _Digests = {}
        for name, tensor in self._tensors():
            state = tensor_state(tensor)
            digests[state] = known.get(state) or (tensor, _digest(tensor))
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + digests[state][1])
        self._digests = digests
        return digest.hexdigest()[:32]

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters, buffers, and what quantized layers store besides them."""
        for n, module in enumerate(self._around):
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            yield from ((f"{n} around {name}", tensor) for name, tensor in sorted(own.items()))
        for n, module in enumerate(self._below):
            own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            stored = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
            yield from ((f"{n} {name}", tensor) for name, tensor in sorted({**stored, **own}.items()))


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def _forward_of(module: nn.Module) -> str:
    """Name the function that a module's class runs, which some libraries replace."""
    forward = type(module).forward
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
