"""Parts of layers: which parameters an organ holds if it does not hold all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from not_hf.architecture.layers import branch_of, output_projections
from not_hf.architecture.part_names import ALL, BRANCHES, Modules
from not_hf.errors import NotHFError, some


def held_parameters(layers: Sequence[nn.Module], modules: Modules) -> list[list[str]]:
    """Name the parameters of each layer that `modules` chooses.

    Args:
        layers: Layers of an organ, or those of a recipient that it replaces.
        modules: `"all"`; `"outputs"`, the matrices through which layers write to the residual stream; `"attention"` or
            `"mlp"`, that branch without the norm before it; or names of modules, each the end of a path, as in PEFT's
            `target_modules`.

    Raises:
        NotHFError: No layer has what is chosen.
    """
    names = [[name for name, _ in layer.named_parameters()] for layer in layers]
    chosen = [modules] if isinstance(modules, str) else modules
    held = {module: [_chosen(layer, module) for layer in layers] for module in chosen}
    if absent := [module for module, found in held.items() if not any(found)]:
        known = dict.fromkeys(_owner(name) for each in names for name in each)
        raise NotHFError(f"no layer has {absent[0]!r}; modules of these layers are {some(list(known))}")
    return [
        [name for name in each if any(name in found[n] for found in held.values())] for n, each in enumerate(names)
    ]


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Put a parameter in the place of one of a module's; if it is `None`, the state dict then lacks it."""
    path, _, key = name.rpartition(".")
    module.get_submodule(path).register_parameter(key, parameter)


def keep_parameters(layers: Iterable[nn.Module], modules: Modules) -> None:
    """Remove the other parameters from layers, which then have values for these alone and cannot run."""
    stack = list(layers)
    for layer, held in zip(stack, held_parameters(stack, modules), strict=True):
        for name, _ in list(layer.named_parameters()):
            if name not in held:
                set_parameter(layer, name, None)


def _chosen(layer: nn.Module, module: str) -> set[str]:
    """Name the parameters that one word of `modules` chooses in a layer."""
    if module == "outputs":
        return {name for name, _ in output_projections(layer)}
    if module in BRANCHES:
        return _of_branch(layer, BRANCHES[module])
    return {name for name, _ in layer.named_parameters() if module == ALL or _is_in(name, module)}


def _of_branch(layer: nn.Module, branches: Sequence[str]) -> set[str]:
    norms = {name for name, child in layer.named_children() if all(p.ndim < 2 for p in child.parameters())}
    norms |= {name for name, _ in layer.named_parameters(recurse=False)}
    firsts = ((name, name.partition(".")[0]) for name, _ in layer.named_parameters())
    return {name for name, first in firsts if first not in norms and branch_of(first) in branches}


def _owner(name: str) -> str:
    """The module of a parameter; of one that is no weight or bias, as of stacked experts, the parameter itself."""
    path, _, leaf = name.rpartition(".")
    return path if path and leaf in ("weight", "bias") else name


def _is_in(name: str, module: str) -> bool:
    """Whether a parameter is in a module, whose name is the end of a path."""
    return f".{module}." in f".{name}." or f".{_owner(name)}".endswith(f".{module}")
