"""Parts of layers: which parameters an organ holds if it does not hold all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from not_hf.architecture.layers import branch_of, output_projections
from not_hf.architecture.upstream import remove_parameter
from not_hf.errors import NotHFError, some

Modules = str | list[str]  # "all", "outputs", "attention", "mlp", or names of modules

ALL = "all"
_BRANCHES = {"attention": ("attention", "mixer"), "mlp": ("mlp",)}


def parts_problem(modules: object) -> str | None:
    """Say why `modules` chooses no parts of layers; `None` if it does."""
    known = (ALL, "outputs", *_BRANCHES)
    if modules in known if isinstance(modules, str) else isinstance(modules, list) and modules:
        names = [modules] if isinstance(modules, str) else modules
        if all(isinstance(name, str) and name and all(map(str.isidentifier, name.split("."))) for name in names):
            return None
    return f"modules must be one of {known} or a list of names of modules in a layer, got {modules!r:.200}"


def held_parameters(layers: Sequence[nn.Module], modules: Modules) -> list[list[str]]:
    """Name the parameters of each layer that `modules` chooses.

    Args:
        layers: Layers of an organ, or those of a recipient that it replaces.
        modules: `"all"`; `"outputs"`, the matrices through which layers write to the residual stream; `"attention"` or
            `"mlp"`, that branch without the norm before it; or names of modules, each the end of a path, as in PEFT's
            `target_modules`.

    Raises:
        NotHFError: A name occurs in no layer.
    """
    if modules == ALL:
        return [[name for name, _ in layer.named_parameters()] for layer in layers]
    if modules == "outputs":
        return [[name for name, _ in output_projections(layer)] for layer in layers]
    if isinstance(modules, str):
        return [_of_branch(layer, _BRANCHES[modules]) for layer in layers]
    names = [[name for name, _ in layer.named_parameters()] for layer in layers]
    for module in modules:
        if not any(_is_in(name, module) for each in names for name in each):
            known = dict.fromkeys(_owner(name) for each in names for name in each)
            raise NotHFError(f"no layer has a module {module!r}; modules of these layers are {some(list(known))}")
    return [[name for name in each if any(_is_in(name, module) for module in modules)] for each in names]


def keep_parameters(layers: Sequence[nn.Module], modules: Modules) -> None:
    """Remove the other parameters from layers, which then have values for these alone and cannot run."""
    for layer, held in zip(layers, held_parameters(layers, modules), strict=True):
        for name, _ in list(layer.named_parameters()):
            if name not in held:
                remove_parameter(layer, name)


def _of_branch(layer: nn.Module, branches: Sequence[str]) -> list[str]:
    norms = {name for name, child in layer.named_children() if all(p.ndim < 2 for p in child.parameters())}
    norms |= {name for name, _ in layer.named_parameters(recurse=False)}
    firsts = ((name, name.partition(".")[0]) for name, _ in layer.named_parameters())
    return [name for name, first in firsts if first not in norms and branch_of(first) in branches]


def _owner(name: str) -> str:
    """The module of a parameter; of one that is no weight or bias, as of stacked experts, the parameter itself."""
    path, _, leaf = name.rpartition(".")
    return path if path and leaf in ("weight", "bias") else name


def _is_in(name: str, module: str) -> bool:
    """Whether a parameter is in a module, whose name is the end of a path."""
    return f".{module}." in f".{name}." or f".{_owner(name)}".endswith(f".{module}")
