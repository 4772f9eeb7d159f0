"""The state of a transplanted model: the layers in its stack, and all that must agree with them.

Every change rebuilds the stack from the unchanged base and the active organs, so it can be undone exactly.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.devices import execution_device, spliced_device_map
from not_hf.architecture.differences import describe, native_differences
from not_hf.architecture.layers import adopt
from not_hf.architecture.splicing import LayerOrigin, set_layer_index, splice_config, spliced_config
from not_hf.architecture.stack import Stack, find_stack
from not_hf.architecture.twin import Twin, meta_twin
from not_hf.architecture.upstream import forget_capture_hooks, set_layers
from not_hf.composition.layout import arrange
from not_hf.errors import interval
from not_hf.recipient.organ import Organ

PlacedLayer = tuple[nn.Module, LayerOrigin]


class Surgery:
    """The base of a transplanted model, and its organs in load order.

    It is a plain attribute of the model: `state_dict`, `parameters` and hooks see only the native model, while
    `deepcopy` and pickle include it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base_revision: str | None = None,
        base_subfolder: str | None = None,
        is_scaffold: bool = False,
    ) -> None:
        stack = meta_twin(model.config, type(model)).stack if is_scaffold else find_stack(model)
        self.native_class = type(model)
        self._where = (stack.base, stack.path)
        self.is_scaffold = is_scaffold  # without the base's own layers, though positions count them
        self.base_layers: list[nn.Module] = list(self.stack(model).layers)
        self.base_config = copy.deepcopy(model.config)
        self.generation_config = copy.deepcopy(getattr(model, "generation_config", None))  # the base's
        self.base_revision = base_revision  # commit, if known
        self.base_subfolder = base_subfolder
        self.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.organs: dict[str, Organ] = {}
        self.disabled = 0
        self.device_map = copy.copy(getattr(model, "hf_device_map", None))
        self._derived: dict[str, dict[tuple[str, str], Any]] = {"": {}}
        self._base_derived: dict[tuple[str, str], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Enable the organs of a copy made inside `disable_donors()`."""
        return {**vars(self), "disabled": 0}

    def stack(self, model: PreTrainedModel) -> Stack:
        """Return the stack of the live model."""
        return Stack(model, *self._where)

    @property
    def active(self) -> list[str]:
        """Names of the active organs, in load order."""
        return [] if self.disabled else [name for name, organ in self.organs.items() if organ.active]

    def _chosen(self) -> list[Organ]:
        return [self.organs[name] for name in self.active]

    def plan(self, organs: Iterable[Organ] | None = None) -> list[PlacedLayer]:
        """Return the layers of the stack with their origins, front to back, for organs (default: the active ones).

        Raises:
            IncompatibleDonorError: Two organs overlap.
        """
        chosen = {organ.name: organ for organ in (self._chosen() if organs is None else organs)}
        placed: list[PlacedLayer] = []
        for name, n in arrange(self.base_config.num_hidden_layers, [organ.place for organ in chosen.values()]):
            if name is not None:
                placed.append((chosen[name].layers[n], (chosen[name].spec.organ, n)))
            elif not self.is_scaffold:
                placed.append((self.base_layers[n], (self.base_config, n)))
        return placed

    def twin(self, placed: list[PlacedLayer]) -> Twin:
        """Return the native model of that stack's config, on the meta device."""
        return meta_twin(spliced_config(self.base_config, [origin for _, origin in placed]), self.native_class)

    def base_twin(self) -> Twin:
        """Return that of the base, with all its layers."""
        return meta_twin(self.base_config, self.native_class)

    def differences(self, placed: list[PlacedLayer]) -> list[str]:
        """List the differences of those live layers from the layers of the native model."""
        return native_differences([describe(layer) for layer, _ in placed], self.twin(placed).descriptions)

    def swap_differences(self, organ: Organ, other: Organ) -> list[str]:
        """List the reasons why the weights of `other` cannot be copied into the tensors of `organ`."""
        if organ.config.span != other.config.span:
            return [f"it holds layers {interval(other.config.span)}, not {interval(organ.config.span)}"]
        spliced, others = (
            splice_config(self.base_config, [(each.spec.organ, n) for n in range(len(each.layers))])
            for each in (organ, other)
        )
        differences = [f"{key} is {others[key]}, not {spliced[key]}" for key in spliced if others[key] != spliced[key]]
        return differences + native_differences(
            [describe(layer) for layer in other.layers], [describe(layer) for layer in organ.layers], there="here"
        )

    @contextlib.contextmanager
    def changing(self, model: PreTrainedModel) -> Iterator[None]:
        """Change organs or their flags inside the block, then the stack; undo everything on failure."""
        organs, disabled = dict(self.organs), self.disabled
        flags = {name: organ.active for name, organ in organs.items()}
        try:
            yield
            self.apply(model)
        except BaseException:
            self.organs, self.disabled = organs, disabled
            for name, organ in organs.items():
                organ.active = flags[name]
            self.apply(model)
            raise

    def apply(self, model: PreTrainedModel) -> None:
        """Make the live model agree with `plan()`. Steps that may raise come first; `changing` undoes the rest."""
        placed = self.plan()
        values = splice_config(self.base_config, [origin for _, origin in placed])
        if not self.active:
            values = {key: copy.deepcopy(getattr(self.base_config, key)) for key in values}
        attributes = self._attributes(placed)

        stack, config = self.stack(model), model.config
        standing = {id(layer) for layer in stack.layers}
        reference = dict(stack.layers[0].named_modules()) if stack.layers else {}
        forget_capture_hooks([model, *self.parked(model), *[layer for layer, _ in placed]])
        for key, value in values.items():
            setattr(config, key, value)
        for (path, key), value in attributes.items():
            setattr(model.get_submodule(path), key, value)
        for n, (layer, _) in enumerate(placed):
            set_layer_index(layer, n)
            if id(layer) not in standing:
                adopt(layer, config, reference, model.training)
        set_layers(stack.layers, [layer for layer, _ in placed])
        if self.device_map is not None:
            vars(model)["hf_device_map"] = self._device_map(placed, stack.full_path)

    def _device_map(self, placed: list[PlacedLayer], path: str) -> dict[str, Any]:
        """Return accelerate's device map with the indices of that stack."""
        assert self.device_map is not None
        origins = [
            i if config is self.base_config else execution_device(layer) or next(layer.parameters()).device
            for layer, (config, i) in placed
        ]
        return spliced_device_map(self.device_map, path, origins) if self.active else dict(self.device_map)

    def _attributes(self, placed: list[PlacedLayer]) -> dict[tuple[str, str], Any]:
        """Return model-level attributes derived from per-layer config values, if any stack so far has changed them.

        They are cached by stack, since computing them builds a twin.
        """
        signature = "" if not self.active else repr(splice_config(self.base_config, [origin for _, origin in placed]))
        if signature not in self._derived:
            base, here = (twin.outer_attributes for twin in (self.base_twin(), self.twin(placed)))
            self._derived[signature] = {key: here[key] for key in base.keys() & here.keys() if base[key] != here[key]}
            self._base_derived.update({key: base[key] for key in self._derived[signature]})
        return {**self._base_derived, **self._derived[signature]}

    def release(self, model: PreTrainedModel) -> None:
        """Restore the `requires_grad` flags of the base, from whose stack the organs have been removed."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))

    @contextlib.contextmanager
    def at_scale_one(self) -> Iterator[None]:
        """Unscale all organs inside the block, to convert or replace their weights."""
        scales = {name: organ.config.scale for name, organ in self.organs.items() if organ.config.scale != 1}
        try:
            for name in scales:
                self.organs[name].rescale(1.0)
            yield
        finally:
            for name, scale in scales.items():
                self.organs[name].rescale(scale)

    def parked(self, model: PreTrainedModel) -> Iterator[nn.Module]:
        """Yield the layers of the model that are not in the stack."""
        standing = {id(layer) for layer in self.stack(model).layers}
        for layer in (*self.base_layers, *(layer for organ in self.organs.values() for layer in organ.layers)):
            if id(layer) not in standing:
                yield layer
