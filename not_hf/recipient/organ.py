"""One organ in a live model: its layers, place and scale."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedConfig

from not_hf.architecture.adapters import own_parameters
from not_hf.architecture.computed_weights import store_weights
from not_hf.architecture.differences import describe, native_differences
from not_hf.architecture.layers import computes, is_finite, require_finite, settle
from not_hf.architecture.master_weights import MasterWeights
from not_hf.architecture.scaling import require_scalable, scaled, scaled_parameters, unscaled
from not_hf.architecture.splicing import splice_config
from not_hf.architecture.stack import Stack
from not_hf.architecture.twin import meta_twin
from not_hf.composition.layout import Place
from not_hf.config import DonorConfig, OrganSpec
from not_hf.errors import IncompatibleDonorError, NotHFError, interval, some
from not_hf.recipient.changes import Changes
from not_hf.recipient.saved_modules import SavedModules


@dataclass(frozen=True)
class DonorStatus:
    """Status of one loaded organ.

    Args:
        name: Name in the model.
        active: Whether the organ is in the stack; `False` inside `disable_donors()`.
        position: Position among the recipient's own layers.
        mode: `"insert"` or `"replace"`.
        scale: Factor of its layers' contribution to the residual stream.
        layers: Indices of its layers in the model's stack; empty if inactive.
        span: Half-open span of the base's layers that it was cut from.
        base: Hub ID or folder of that base.
        donor: Folder or Hub ID of the donor, `None` for a `DonorModel`.
        revision: Commit of the donor's repo.
        modules_to_save: Names of the modules beside the layers that belong to it, whole or some rows of them.
        num_parameters: Number of parameters.
        num_trainable_parameters: Number of parameters that require gradients.
        dtypes: dtypes of its parameters (`float32`, …).
        devices: Devices of its parameters (`cpu`, `cuda:0`, …).
    """

    name: str
    active: bool
    position: int
    mode: str
    scale: float
    layers: list[int]
    span: tuple[int, int]
    base: str | None
    donor: str | None
    revision: str | None
    modules_to_save: list[str]
    num_parameters: int
    num_trainable_parameters: int
    dtypes: list[str]
    devices: list[str]


def inside(names: Iterable[str], n: int) -> set[str]:
    """Return those of the names `<layer>.<name in the layer>` that are in layer `n`, as they are in it."""
    return {name.removeprefix(f"{n}.") for name in names if name.startswith(f"{n}.")}


@dataclass
class Organ:
    """One loaded organ."""

    name: str
    config: DonorConfig  # with the position, mode and scale in this model
    spec: OrganSpec  # with those of the donor
    layers: list[nn.Module]
    active: bool = True
    repo: str | None = None  # folder or Hub ID of the donor
    revision: str | None = None  # commit of that repo
    originals: dict[str, torch.Tensor] = field(default_factory=dict)  # unscaled values of the scaled tensors
    replaced: Sequence[nn.Module] = ()  # the recipient's layers in whose place it stands
    saved: SavedModules = field(default_factory=SavedModules)
    kept: frozenset[str] = frozenset()  # names, `<layer>.<name in the layer>`, of the recipient's own in its layers

    @property
    def modules(self) -> list[nn.Module]:
        """The organ's layers, and its modules beside them."""
        return [*self.layers, *self.saved.modules.values()]

    @property
    def place(self) -> Place:
        """The organ's place in the recipient."""
        return Place(self.name, self.config.position or 0, self.config.mode, len(self.layers))

    def status(self, layers: list[int]) -> DonorStatus:
        """Describe the organ, whose layers have these indices in the stack."""
        parameters = list(dict.fromkeys(self.parameters()))
        return DonorStatus(
            name=self.name,
            active=bool(layers),
            position=self.place.position,
            mode=self.config.mode,
            scale=self.config.scale,
            layers=layers,
            span=self.config.span,
            base=self.config.base_model_name_or_path,
            donor=self.repo,
            revision=self.revision,
            modules_to_save=list(self.saved.paths),
            num_parameters=sum(parameter.numel() for parameter in parameters),
            num_trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            dtypes=sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}),
            devices=sorted({str(parameter.device) for parameter in parameters}),
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the organ's parameters; of a module of which it has some rows only, these if they are apart."""
        for name, parameter in nn.ModuleList(self.layers).named_parameters():
            if name not in self.kept:
                yield parameter
        yield from self.saved.parameters()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the organ's tensors in its layers, by `<layer>.<name in the layer>`."""
        tensors = nn.ModuleList(self.layers).state_dict()
        return {name: tensor for name, tensor in tensors.items() if name not in self.kept}

    def set_trainable(self, is_trainable: bool) -> None:
        """Freeze the organ, or restore the native `requires_grad` flags (some parameters are frozen by design)."""
        self.saved.set_trainable(is_trainable)
        if not is_trainable:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
            return
        flags = {name: parameter.requires_grad for name, parameter in self._native_parameters()}
        for name, parameter in nn.ModuleList(self.layers).named_parameters():
            if name not in self.kept:
                parameter.requires_grad_(flags[name])

    def learns(self) -> bool:
        """Whether parameters of its own require gradients, and not only adapters (LoRA) in its layers."""
        natives = {name for name, _ in self._native_parameters()} - self.kept
        own = (p for name, p in nn.ModuleList(self.layers).named_parameters() if name in natives)
        return any(parameter.requires_grad for parameter in itertools.chain(own, self.saved.parameters()))

    def _native_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of native layers, on the meta device, by `<layer>.<name in the layer>`."""
        yield from nn.ModuleList(meta_twin(self.spec.base).stack.layers[slice(*self.config.span)]).named_parameters()

    def release_master_weights(self, neighbour: nn.Module) -> None:
        """Round master weights to the dtype of the recipient's layer `neighbour`, and put token rows in their places.

        Raises:
            CorruptDonorError: A value overflows in that dtype.
        """
        for n, layer in enumerate(self.layers):
            if isinstance(layer, MasterWeights):
                store_weights(layer)
                settle(layer, neighbour, next(layer.parameters()).device, kept=inside(self.kept, n))
                require_finite([layer], self.name, {})
        self.saved = self.saved.merged()

    @torch.no_grad()
    def rescale(self, scale: float, changes: Changes | None = None) -> None:
        """Change the scale, in place; 1 restores the weights exactly.

        Args:
            scale: A finite number.
            changes: Those of the model that the organ is in.

        Raises:
            NotHFError: The organ was trained at scale 0, or a scaled weight overflows its dtype; nothing is changed.
        """
        parameters = self.scalable()
        at_one = {name: self.at_scale_one(name, p.detach()) for name, p in parameters.items()}
        originals = {} if scale == 1 else {name: tensor.clone() for name, tensor in at_one.items()}
        values = {name: self.at_scale(name, tensor, scale) for name, tensor in originals.items()} or at_one
        for name, value in values.items():
            layer = self.layers[int(name.partition(".")[0])]
            dtype = layer.computes_in if isinstance(layer, MasterWeights) else value.dtype
            if not is_finite(value.to(dtype)):
                raise NotHFError(
                    f"organ {self.name!r}: at scale {scale:g} weights overflow {dtype} ({name}); use a smaller scale"
                )

        def bookkeep() -> None:
            self.originals, self.config.scale = originals, scale

        self._overwrite(parameters, values, bookkeep, changes)

    @torch.no_grad()
    def take_over(self, other: Organ, changes: Changes) -> None:
        """Copy the weights and config of `other`, which has the same structure and scale; keep the place."""
        ours, theirs = (organ.state() | organ.saved.state() for organ in (self, other))
        config = copy.copy(other.config)
        config.position, config.mode = self.config.position, self.config.mode

        def bookkeep() -> None:
            self.config, self.spec, self.originals = config, other.spec, other.originals
            self.repo, self.revision = other.repo, other.revision

        self._overwrite(ours, theirs, bookkeep, changes)

    def _overwrite(
        self,
        tensors: Mapping[str, torch.Tensor],
        values: Mapping[str, torch.Tensor],
        bookkeep: Callable[[], None],
        changes: Changes | None,
    ) -> None:
        """Copy values into tensors and note it; restore both if that fails or is interrupted."""
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        noted, scale = dict(vars(self)), self.config.scale

        def overwrite() -> None:
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
            bookkeep()

        def restore() -> None:
            vars(self).update(noted)
            self.config.scale = scale
            for name, tensor in tensors.items():
                tensor.copy_(before[name])

        (changes or Changes()).make(overwrite, restore)

    def scalable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that a scale changes, by `<layer>.<name in the layer>`, also under adapters (LoRA)."""
        if self.config.mode == "insert":
            return dict(scaled_parameters(self.layers))
        own = own_parameters(nn.ModuleList(self.layers))
        return {name: each for name, each in own if name not in self.kept and computes(each)}

    def _replaced(self, name: str) -> torch.Tensor | None:
        """Return the parameter of the recipient in whose place one stands; `None` for an inserted organ."""
        if self.config.mode == "insert":
            return None
        n, _, inner = name.partition(".")
        return dict(own_parameters(self.replaced[int(n)]))[inner].detach()

    def require_scalable(self, stack: Stack) -> None:
        """Check that the organ can have another scale than 1.

        Raises:
            IncompatibleDonorError: It replaces layers of another structure, or none that could be compared.
            UnsupportedArchitectureError: It is inserted, and a norm undoes the scale.
        """
        if self.config.mode == "insert":
            require_scalable(stack, self.layers)
            return
        ours = {name: each.shape for name, each in self.scalable().items()}
        theirs = own_parameters(nn.ModuleList(self.replaced))
        found = {name: each.shape for name, each in theirs if computes(each) and not each.is_meta and name in ours}
        if unmatched := sorted(name for name, _ in ours.items() ^ found.items()):
            raise IncompatibleDonorError(
                f"organ {self.name!r} has no scale but 1: the layers that it replaces are quantized, offloaded or "
                f"others ({some(unmatched)})"
            )

    def at_scale(self, name: str, original: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the value at a scale of a parameter `<layer>.<name in the layer>` that is `original` at scale 1."""
        return scaled(original, scale, self._replaced(name))

    def at_scale_one(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the unscaled value of `tensor`, named `<layer>.<name in the layer>`; raises as `unscaled`."""
        if name not in self.originals:
            return tensor
        original = self.originals[name].to(tensor.device)
        return unscaled(tensor, original, self.config.scale, self._replaced(name))


def swap_differences(recipient: PreTrainedConfig, organ: Organ, other: Organ) -> list[str]:
    """List the reasons why the weights of `other` cannot be copied into the tensors of `organ`.

    Args:
        recipient: Native config of the recipient without organs.
        organ: An organ in it.
        other: Another one, made for its place.
    """
    if organ.config.span != other.config.span:
        return [f"it holds layers {interval(other.config.span)}, not {interval(organ.config.span)}"]
    if organ.kept != other.kept:
        return [f"it holds modules={other.config.modules!r} of these layers, not {organ.config.modules!r}"]
    ours, theirs = ({key: tensor.shape for key, tensor in each.saved.tensors()} for each in (organ, other))
    if differing := sorted(key for key, _ in ours.items() ^ theirs.items()):
        return [f"modules beside the layers have other tensors: {some(differing)}"]
    if organ.saved.rows != other.saved.rows:  # of as many tokens
        return [f"it holds rows of {other.saved.rows!r:.200}, not {organ.saved.rows!r:.200}"]
    spliced, others = (
        splice_config(recipient, [(each.spec.organ, n) for n in range(len(each.layers))]) for each in (organ, other)
    )
    differences = [f"{key} is {others[key]}, not {spliced[key]}" for key in spliced if others[key] != spliced[key]]
    return differences + native_differences(
        [describe(layer) for layer in other.layers], [describe(layer) for layer in organ.layers], there="here"
    )
