"""Modules whose parameters are computed from others in each forward; their class is extended in place."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from not_hf.architecture.upstream import rebind_forward, replaced_parameters, traced_parameters

# While a module runs, its parameters are the computed ones; a second thread in it would take those for its own
_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class ComputedWeights(nn.Module):
    """Mixed into the class of a module: its forward runs with parameters that `computed` returns."""

    attributes: ClassVar[tuple[str, ...]]  # that a module of this class has beside those of the native one

    def computed(self, given: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Compute parameters, by name, for a forward with this first argument."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in the native class."""
        if torch.compiler.is_compiling():  # nothing is replaced in a compiled graph
            return self._forward_computed(traced_parameters, *args, **kwargs)
        with _locks.setdefault(self, threading.RLock()):
            return self._forward_computed(replaced_parameters, *args, **kwargs)

    def _forward_computed(self, replaced: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        with replaced(self, self.computed(given)):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the native class and extend it again, since the dynamic class cannot be imported by name."""
        return _revive, type(self).__bases__, self.__getstate__()


def compute_weights(module: nn.Module, kind: type[ComputedWeights], **attributes: Any) -> None:
    """Extend the class of a module by `kind`, to one of the same name, and set its attributes."""
    native = native_class(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    module.__class__ = _extended(cast(Any, kind), cast(Any, native))


def store_weights(module: nn.Module) -> None:
    """Return a module to its native class."""
    if isinstance(module, ComputedWeights):
        for name in module.attributes:
            delattr(module, name)
        module.__class__ = native_class(module)  # type: ignore[assignment]
    rebind_forward(module)


def native_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module in transformers or torch."""
    kind = type(module)
    return cast(type[nn.Module], kind.__bases__[1]) if issubclass(kind, ComputedWeights) else kind


@functools.cache
def _extended(kind: Any, native: Any) -> Any:
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    return type(native.__name__, (kind, native), names)


def _revive(kind: Any, native: Any) -> nn.Module:
    extended = _extended(kind, native)
    return cast(nn.Module, extended.__new__(extended))
