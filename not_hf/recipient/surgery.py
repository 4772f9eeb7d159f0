"""The state of a transplanted model: the layers in its stack, and all that must agree with them.

Every change rebuilds the stack from the unchanged base and the active organs, so it can be undone exactly.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.devices import execution_device, spliced_device_map
from not_hf.architecture.differences import describe, native_differences
from not_hf.architecture.layers import adopt, configs_of, is_finite
from not_hf.architecture.master_weights import MasterWeights, hold_master_weights
from not_hf.architecture.sharing import LayerOrigin
from not_hf.architecture.splicing import (
    own_values,
    require_counted,
    set_layer_index,
    splice_config,
    spliced_config,
)
from not_hf.architecture.stack import Stack, find_stack, layers_config, with_layers_config
from not_hf.architecture.twin import Twin, meta_twin
from not_hf.architecture.upstream import forget_capture_hooks, set_layers
from not_hf.composition.layout import arrange, require_free_names
from not_hf.donor.saved_modules import class_names
from not_hf.errors import NotHFError
from not_hf.recipient.changes import Changes
from not_hf.recipient.class_names import ClassNames
from not_hf.recipient.derived_attributes import DerivedAttributes
from not_hf.recipient.generation_configs import GenerationConfigs
from not_hf.recipient.organ import Organ
from not_hf.recipient.own_weights import OwnWeights
from not_hf.recipient.saved_modules import standing_modules

PlacedLayer = tuple[nn.Module, LayerOrigin]

_ATTRIBUTES = {"_surgery", "model_tags", "_weight_conversions"}  # of a model, which come and go with its organs


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
        is_live: bool = False,
    ) -> None:
        stack = meta_twin(model.config, type(model)).stack if is_scaffold else find_stack(model)
        self.native_class = type(model)
        self._where = (stack.base, stack.path)
        self.is_scaffold = is_scaffold  # without the base's own layers, though positions count them
        self.base_layers: list[nn.Module] = list(self.stack(model).layers)
        self.own_weights = OwnWeights(self.base_layers)
        self.base_config = copy.deepcopy(layers_config(model.config))
        self._model_config = copy.deepcopy(model.config)  # of which `base_config` is a part, if it has a text model
        self.base_config.name_or_path = model.config.name_or_path
        self.generation_config = copy.deepcopy(getattr(model, "generation_config", None))  # the base's
        self.generation_configs = GenerationConfigs(getattr(model, "generation_config", None))
        self.base_revision = base_revision  # commit, if known
        self.base_subfolder = base_subfolder
        self.is_live = is_live  # loaded by the caller, perhaps from a subfolder, which no config tells
        self.base_modules: dict[str, nn.Module] = {}  # by path, in whose place those of organs may stand
        self.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.organs: dict[str, Organ] = {}
        self.changes = Changes()
        self.blocks: tuple[weakref.ref[Any], ...] = ()  # the open `disable_donors()` blocks
        self._shows_base = True  # whether the stack is the base's, because no organ is active
        self.device_map = copy.copy(getattr(model, "hf_device_map", None))
        self._derived = DerivedAttributes(self.base_layers)
        self._class_names = ClassNames(class_names(model.config))

    def __getstate__(self) -> dict[str, Any]:
        """Enable the organs of a copy made inside `disable_donors()`."""
        return {**vars(self), "blocks": ()}

    def stack(self, model: PreTrainedModel) -> Stack:
        """Return the stack of the live model."""
        return Stack(model, *self._where)

    @property
    def active(self) -> list[str]:
        """Names of the active organs, in load order."""
        if [block for block in self.blocks if block() is not None]:
            return []
        return [name for name, organ in self.organs.items() if organ.active]

    def _chosen(self) -> list[Organ]:
        return [self.organs[name] for name in self.active]

    def plan(self, organs: Iterable[Organ] | None = None) -> list[PlacedLayer]:
        """Return the layers of the stack with their origins, front to back, for organs (default: the active ones).

        Raises:
            IncompatibleDonorError: Two organs overlap, or hold the same module.
        """
        chosen = {organ.name: organ for organ in (self._chosen() if organs is None else organs)}
        self._standing(chosen.values())
        placed: list[PlacedLayer] = []
        for name, n in arrange(self.base_config.num_hidden_layers, [organ.place for organ in chosen.values()]):
            if name is not None:
                placed.append((chosen[name].layers[n], self._origin(chosen[name], n)))
            elif not self.is_scaffold:
                placed.append((self.base_layers[n], (self.base_config, n)))
        return placed

    def twin(self, placed: list[PlacedLayer]) -> Twin:
        """Return the native model of that stack's config, on the meta device."""
        return self._twin(spliced_config(self.base_config, [origin for _, origin in placed]))

    def base_twin(self) -> Twin:
        """Return that of the base, with all its layers."""
        return self._twin(self.base_config)

    def _twin(self, config: PreTrainedConfig) -> Twin:
        return meta_twin(with_layers_config(self._model_config, config), self.native_class, self.is_scaffold)

    def differences(self, placed: list[PlacedLayer]) -> list[str]:
        """List the differences of those live layers from the layers of the native model."""
        return native_differences([describe(layer) for layer, _ in placed], self.twin(placed).descriptions)

    def change(self, model: PreTrainedModel, change: Callable[[], None], flags: bool = False) -> None:
        """Change organs, their flags or the class of the model, then its stack; undo everything on failure.

        Args:
            model: The live model.
            change: Makes the change; the stack is rebuilt afterwards.
            flags: Whether it changes `requires_grad` flags, master weights or the configs that modules hold, which are
                then restored too.
        """

        def whole() -> None:
            change()
            self.apply(model)

        with self.changes.lock:  # what is undone leads back to the state after another thread's change
            self._require_standing(model)
            self.changes.make(whole, self._undoing(model, flags))

    def _undoing(self, model: PreTrainedModel, flags: bool) -> Callable[[], None]:
        """Return a function that restores the model as it is now."""
        kind, organs, blocks = type(model), dict(self.organs), self.blocks
        states = [(organ, organ.active, organ.saved) for organ in organs.values()]
        kept = {key: vars(model)[key] for key in _ATTRIBUTES if key in vars(model)}
        parts = (model, *self.parked(model)) if flags else ()
        parameters = {p: p.requires_grad for part in parts for p in part.parameters()}
        configs = [held for part in parts for held in configs_of(part)]
        held = organs.values() if flags else ()
        layers = [layer for organ in held for layer in organ.layers if isinstance(layer, MasterWeights)]
        masters = [
            (layer, (layer.not_cast, layer.computes_in), {p: (p.data, p.grad) for p in layer.parameters()})
            for layer in layers
        ]

        def undo() -> None:
            vars(model).update(kept)  # before the class, which needs `_surgery`
            model.__class__ = kind
            for key in _ATTRIBUTES - kept.keys():
                vars(model).pop(key, None)
            self.organs, self.blocks = organs, blocks
            for organ, is_active, saved in states:
                organ.active, organ.saved = is_active, saved
            for layer, dtypes, values in masters:
                hold_master_weights(layer, *dtypes)
                for parameter, (data, grad) in values.items():
                    parameter.grad, parameter.data = None, data
                    parameter.grad = grad
            for parameter, flag in parameters.items():
                parameter.requires_grad_(flag)
            for module, key, config in configs:
                vars(module)[key] = config
            self.apply(model)

        return undo

    def repair(self, model: PreTrainedModel) -> None:
        """Complete what Ctrl-C has interrupted: undoing a change, or leaving a `disable_donors()` block."""
        self.changes.repair()
        if not (self._shows_base and self.active):
            return
        with self.changes.lock:
            if self._shows_base and self.active:  # not another thread's change, which has just ended
                self.changes.make(lambda: self.apply(model), lambda: self.apply(model))

    def apply(self, model: PreTrainedModel) -> None:
        """Make the live model agree with `plan()`. Steps that may raise come first; `change` undoes the rest."""
        placed = self.plan()
        values = splice_config(self.base_config, [origin for _, origin in placed])
        if self.active:
            require_counted(self.base_config, spliced_config(self.base_config, [origin for _, origin in placed]))
        else:
            values = own_values(self.base_config, values)
        signature = repr(values) if self.active else ""
        if signature not in self._derived:
            self._derived.note(signature, self.base_twin(), self.twin(placed))
        attributes, of_places = self._derived.of(signature)
        held = {path for organ in self.organs.values() for path in organ.saved.modules}
        for path in held - self.base_modules.keys():
            self.base_modules[path] = model.get_submodule(path)  # the recipient's, as no organ's was put there yet
        modules = self._standing(self._chosen())
        if self.base_modules:
            sizes = [organ.saved.vocab_size for organ in self._chosen() if organ.saved.vocab_size]
            values["vocab_size"] = (sizes or [self.base_config.vocab_size])[0]

        stack = self.stack(model)
        config = stack.base_model.config
        standing = {id(layer) for layer in stack.layers}
        entering = [layer for layer, _ in placed if id(layer) not in standing]
        reference = dict(stack.layers[0].named_modules()) if stack.layers else {}
        forget_capture_hooks(model, stack.full_path, entering)
        for key, value in values.items():
            setattr(config, key, value)
            setattr(layers_config(model.config), key, value)  # the same object, or what was copied
        self.name_classes(model)
        self.generation_configs.choose(model, bool(self.active))
        for path, module in modules.items():
            if model.get_submodule(path) is not module:
                module.train(model.training)
                model.set_submodule(path, module)
        for owner in (model, stack.base_model) if self.base_modules else ():
            if "vocab_size" in vars(owner):
                owner.vocab_size = values["vocab_size"]
        for (path, key), value in attributes.items():
            setattr(model.get_submodule(path), key, copy.copy(value))
        for n, ((layer, _), of_place) in enumerate(zip(placed, of_places, strict=True)):
            set_layer_index(layer, n, len(placed), of_place)
        for layer in entering:
            adopt(layer, config, reference, model.training)
        set_layers(stack.layers, [layer for layer, _ in placed])
        self._shows_base = not self.active
        if self.device_map is not None:
            vars(model)["hf_device_map"] = self._device_map(placed, stack.full_path)
        self.base_modules = {path: self.base_modules[path] for path in held}

    def name_classes(self, model: PreTrainedModel) -> None:
        """Have the config name the classes of a classifier as its organ does."""
        loaded, active = ([organ.config for organ in organs] for organs in (self.organs.values(), self._chosen()))
        self._class_names.show(model.config, loaded, active)

    def _origin(self, organ: Organ, n: int) -> LayerOrigin:
        """Return the origin of an organ's layer; one that holds parts of layers is in those of the base."""
        return (self.base_config, organ.place.position + n) if organ.kept else (organ.spec.organ, n)

    def _standing(self, organs: Iterable[Organ]) -> dict[str, nn.Module]:
        return standing_modules(self.base_modules, {organ.name: organ.saved for organ in organs})

    def _require_standing(self, model: PreTrainedModel) -> None:
        """Check that the modules beside the layers are those that organs and recipient have put there.

        Raises:
            NotHFError: Something else has replaced one.
        """
        for path, module in self._standing(self._chosen()).items():
            if model.get_submodule(path) is not module:
                raise NotHFError(
                    f"{path} was replaced after organs were loaded; merge or unload adapters (LoRA) on it first"
                )

    def _device_map(self, placed: list[PlacedLayer], path: str) -> dict[str, Any]:
        """Return accelerate's device map with the indices of that stack."""
        assert self.device_map is not None
        origins = [
            i if config is self.base_config else execution_device(layer) or next(layer.parameters()).device
            for layer, (config, i) in placed
        ]
        return spliced_device_map(self.device_map, path, origins) if self.active else dict(self.device_map)

    def release(self, model: PreTrainedModel, can_learn: bool = False) -> None:
        """Restore the `requires_grad` flags of the base, or set all, whether organs are in its stack or not."""
        path = f"{self.stack(model).full_path}."
        outside = {name: p for name, p in model.named_parameters() if not name.startswith(path)}
        for at, module in self.base_modules.items():
            outside |= {f"{at}.{key}": parameter for key, parameter in module.named_parameters()}
        layers = {f"{path}{n}.{k}": p for n, layer in enumerate(self.base_layers) for k, p in layer.named_parameters()}
        for name, parameter in (outside | layers).items():
            flag = self.requires_grad.get(name, parameter.requires_grad)
            parameter.requires_grad_(flag or can_learn)

    def at_scale_one(self, change: Callable[[], None]) -> None:
        """Convert or replace weights while no organ is scaled."""
        scales = {name: organ.config.scale for name, organ in self.organs.items() if organ.config.scale != 1}

        def rescale() -> None:
            for name, scale in scales.items():
                if self.organs[name].config.scale != scale:
                    self.organs[name].rescale(scale)

        def whole() -> None:
            for name in scales:
                self.organs[name].rescale(1.0)
            change()
            rescale()

        self.changes.make(whole, rescale)

    def require_scalable_to(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Check that no scaled weight overflows the dtype to which `fn` converts it.

        Raises:
            NotHFError: One does.
        """
        for organ in self.organs.values():
            for name, tensor in organ.originals.items():
                dtype = fn(tensor[:0]).dtype
                if dtype != tensor.dtype and not is_finite(organ.at_scale(name, tensor.to(dtype), organ.config.scale)):
                    raise NotHFError(
                        f"organ {organ.name!r}: at scale {organ.config.scale:g} weights overflow {dtype} ({name}); "
                        "use a smaller scale"
                    )

    def neighbour(self, model: PreTrainedModel, position: int) -> nn.Module:
        """Return the module whose dtype and device an organ at that position takes."""
        modules = self.base_layers or [model.get_input_embeddings()]  # a scaffold has no layers
        return modules[min(position, len(modules) - 1)]

    def require_layers(self, operation: str) -> None:
        """Check that the model is not a scaffold."""
        if self.is_scaffold:
            raise NotHFError(
                f"{operation}() needs the base's own layers, which scaffold='minimal' leaves out; save the organ with "
                "save_pretrained() and load it into the whole base: from_pretrained(base, folder)"
            )

    def add(self, organ: Organ) -> None:
        """Add an organ, unless another thread has loaded one of that name meanwhile."""
        require_free_names([organ.name], list(self.organs))
        self.organs[organ.name] = organ

    def parked(self, model: PreTrainedModel) -> Iterator[nn.Module]:
        """Yield layers of the model that are not in its stack, and modules in whose place others stand."""
        standing = {id(layer) for layer in self.stack(model).layers}
        standing |= {id(model.get_submodule(path)) for path in self.base_modules}
        organs = (module for organ in self.organs.values() for module in organ.modules)
        for module in (*self.base_layers, *self.base_modules.values(), *organs):
            if id(module) not in standing:
                yield module
