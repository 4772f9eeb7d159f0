"""Master weights: a layer that is trained in float32 and computes in the dtype of the model around it.

In bfloat16 most updates of a weight are smaller than the distance to the next number, and are lost.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from not_hf.architecture.upstream import parameters_in, rebind_forward, replaced_parameters, traced_parameters

# While a layer runs, its parameters are the cast ones; a second thread in it would take those for the layer's own
_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class MasterWeights(nn.Module):
    """Mixed into the class of a layer: casts float32 parameters to the dtype of the hidden states in each forward."""

    not_cast: frozenset[str]  # names of parameters that are float32 in the recipient's layers too
    computes_in: torch.dtype  # dtype of the recipient's layers when the organ was loaded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the native class."""
        if torch.compiler.is_compiling():  # nothing is replaced in a compiled graph
            return self._forward_cast(traced_parameters, *args, **kwargs)
        with _locks.setdefault(self, threading.RLock()):
            return self._forward_cast(replaced_parameters, *args, **kwargs)

    def _forward_cast(self, replaced: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dtype = (args[0] if args else kwargs["hidden_states"]).dtype
        masters = {name: p for name, p in parameters_in(self) if p.dtype == torch.float32 != dtype}
        values = {name: p.to(dtype) for name, p in masters.items() if name not in self.not_cast}
        with replaced(self, values):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the native class and extend it again, since the dynamic class cannot be imported by name."""
        return _revive, (native_class(self),), self.__dict__


def hold_master_weights(layer: nn.Module, not_cast: Iterable[str], computes_in: torch.dtype) -> None:
    """Have a layer cast its other parameters in each forward; its class becomes one of the same name."""
    vars(layer).update(not_cast=frozenset(not_cast), computes_in=computes_in)
    layer.__class__ = _class_with_master_weights(cast(Any, native_class(layer)))


def release_master_weights(layer: nn.Module) -> None:
    """Return a layer to its native class."""
    layer.__class__ = native_class(layer)
    for key in ("not_cast", "computes_in"):
        vars(layer).pop(key, None)
    rebind_forward(layer)


def native_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer in transformers."""
    kind = type(layer)
    return cast(type[nn.Module], kind.__bases__[1]) if issubclass(kind, MasterWeights) else kind


@functools.cache
def _class_with_master_weights(native: Any) -> Any:
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    return type(native.__name__, (MasterWeights, native), names)


def _revive(native: Any) -> nn.Module:
    kind = _class_with_master_weights(native)
    return cast(nn.Module, kind.__new__(kind))
