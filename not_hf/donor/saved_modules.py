"""Modules beside the layers that a donor holds by explicit choice, whole or some of their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.outer_modules import find_outer_module, tied_modules
from not_hf.architecture.stack import Stack, find_stack, layers_config, saved_class
from not_hf.architecture.twin import Twin, meta_twin
from not_hf.config import DonorConfig
from not_hf.donor.cutting import LiveBase, StoredBase
from not_hf.errors import NotHFError

# How the names of their tensors begin in a donor's checkpoint; the module's name, and that in the module, follow
WHOLE, ROWS = "modules_to_save", "token_rows"

Indices = Sequence[int] | Mapping[str, Sequence[int]]

Tensor = TypeVar("Tensor")


def saved_name(kind: str, name: str, key: str) -> str:
    """Return the name in a checkpoint of a tensor: its kind, its module as the config names it, its name there."""
    return f"{kind}.{name}.{key}"


def is_saved(name: str) -> bool:
    """Whether a tensor of that name in a donor's checkpoint belongs to a module beside the layers."""
    return name.startswith((f"{WHOLE}.", f"{ROWS}."))


def saved_problems(config: DonorConfig, tensors: Mapping[str, Any], partial: bool = False) -> list[str]:
    """Report missing, unexpected and mis-shaped tensors among those for which `is_saved`, as far as a config tells.

    With `partial`, none are missing.
    """
    rows = {
        saved_name(ROWS, name, "weight"): len(indices)
        for name, indices in (config.trainable_token_indices or {}).items()
    }
    whole = [saved_name(WHOLE, name, "") for name in config.modules_to_save or []]
    absent = [name for name in rows if name not in tensors]
    absent += [f"{start}…" for start in whole if not any(name.startswith(start) for name in tensors)]
    problems = [] if partial else [f"missing {name}" for name in absent]
    expected = {
        name for name in tensors if name.startswith(tuple(whole)) and _can_be_held(name, tensors)
    } | rows.keys()
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    return problems + [
        f"{name} has shape {tuple(tensors[name].shape)}, expected ({count}, hidden)"
        for name, count in rows.items()
        if name in tensors and (len(tensors[name].shape) != 2 or tensors[name].shape[0] != count)
    ]


def _can_be_held(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether a module can have a tensor of that name, beside the others."""
    steps = name.split(".")
    is_taken = any(".".join(steps[:n]) in tensors for n in range(1, len(steps)))
    return not is_taken and not any(hasattr(nn.Module, step) or not step.isidentifier() for step in steps[1:])


def attach(donor: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Have a donor hold tensors, by the names that they have in its state dict."""
    for name, tensor in tensors.items():
        owner, (*path, leaf) = donor, name.split(".")
        for step in path:
            if step not in dict(owner.named_children()):
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def held_by(donor: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a donor for which `is_saved`."""
    return {name: tensor for name, tensor in donor.state_dict().items() if is_saved(name)}


def choose_modules(
    config: DonorConfig, stack: Stack, modules_to_save: Sequence[str] | None, token_indices: Indices | None
) -> None:
    """Enter into a donor's config the modules of a model that its organ is to hold, behind those that it has.

    Args:
        config: Is changed.
        stack: That of the model.
        modules_to_save: As in `DonorModel.from_base`, like `token_indices`.

    Raises:
        NotHFError: There is no such module, or it has no such rows, or none are chosen.
    """
    rows = dict(config.trainable_token_indices or {})
    if token_indices is not None and not isinstance(token_indices, Mapping):
        token_indices = {_name_of_embeddings(stack): token_indices}
    for name, indices in (token_indices or {}).items():
        module = stack.model.get_submodule(find_outer_module(stack, name))
        weight = getattr(module, "weight", None)
        held, chosen = rows.get(name, []), list(map(int, indices))
        if not chosen:
            raise NotHFError(f"trainable_token_indices of {name} must be ids of tokens, got none; leave it out")
        unknown = {*chosen} - {*held}
        if not (isinstance(weight, nn.Parameter) and weight.ndim == 2) or not unknown <= {*range(len(weight))}:
            size = "no rows" if weight is None else f"{len(weight)} rows"
            raise NotHFError(
                f"trainable_token_indices {chosen!r:.100} are not rows of {name}, which has {size}; "
                "call resize_token_embeddings(len(tokenizer)) first"
            )
        if getattr(module, "bias", None) is not None:
            raise NotHFError(f"{name} has a bias beside its rows; use modules_to_save=[{name!r}]")
        rows[name] = list(dict.fromkeys([*held, *chosen]))
    if isinstance(modules_to_save, str):
        raise NotHFError(f"modules_to_save must be a list of names, got {modules_to_save!r}")
    added = [name for name in modules_to_save or () if name not in (config.modules_to_save or ())]
    names = list(dict.fromkeys([*(config.modules_to_save or []), *added]))
    owners: dict[str, str] = {}
    for name in (*names, *rows):
        for path in tied_modules(stack, find_outer_module(stack, name)):
            if path in owners:
                raise NotHFError(f"{name} and {owners[path]} are or share {path}; name one of them")
            owners[path] = name
    config.modules_to_save, config.trainable_token_indices = names or None, rows or None
    model: Any = stack.model
    if model.get_output_embeddings() is None and any(_is_classifier(stack, name) for name in added):
        config.labels = class_names(model.config)


def class_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of the classes that a native config has, in order."""
    names = (config.id2label or {}).items()  # its keys may be strings, as they are read from JSON
    return [str(label) for _, label in sorted(names, key=lambda each: int(each[0]))]


def _is_classifier(stack: Stack, name: str) -> bool:
    """Whether a module has a row for each class."""
    model: Any = stack.model
    module = model.get_submodule(find_outer_module(stack, name))
    return any(parameter.shape[:1] == (model.config.num_labels,) for parameter in module.parameters())


def cut_modules(base: LiveBase | StoredBase, config: DonorConfig) -> dict[str, Any]:
    """Return the tensors of the base's modules that a config names, copied or as lazy views.

    Raises:
        NotHFError: A stored base has them under other names.
    """
    if not _names(config):
        return {}
    stack = base_stack(base)
    stored = {} if isinstance(base, LiveBase) else base.outside()
    found: dict[str, Any] = {}
    for name in _names(config):
        indices = (config.trainable_token_indices or {}).get(name)
        paths = tied_modules(stack, find_outer_module(stack, name))
        for key, tensor in stack.model.get_submodule(paths[0]).state_dict().items():
            if isinstance(base, StoredBase):
                tensor = _stored_tensor(base, stored, [f"{path}.{key}" for path in paths])
            value = tensor[...] if indices is None else tensor[...][indices]
            found[saved_name(WHOLE if indices is None else ROWS, name, key)] = value.detach().clone()
    return found


def module_problems(config: DonorConfig, recipient: PreTrainedModel | PreTrainedConfig) -> list[str]:
    """List why a recipient cannot take the modules that a donor's config names; they are not compared by shape.

    A config does not tell the head, nor, of models for more than text, what is tied: the rest is looked at.
    """
    if not _names(config):
        return []
    if isinstance(recipient, PreTrainedModel):
        stack = find_stack(recipient)
    elif layers_config(recipient) is recipient:
        stack = _tied(meta_twin(recipient))
    else:
        return []
    problems: list[str] = []
    owners: dict[str, str] = {}
    for name in _names(config):
        try:
            group = tied_modules(stack, find_outer_module(stack, name))
        except NotHFError as error:
            if isinstance(recipient, PreTrainedModel):
                problems.append(str(error))
            continue
        if taken := [owners[path] for path in group if path in owners]:
            problems.append(
                f"the recipient shares one weight between {taken[0]} and {name}, and the donor holds one for each; "
                "choose a recipient whose embeddings and head have weights of their own"
            )
        owners |= dict.fromkeys(group, name)
    return problems


def sharing_differences(config: DonorConfig, base: PreTrainedConfig, recipient: PreTrainedConfig) -> list[str]:
    """List the modules that a donor's config names and that share their weight in its base or a recipient alone."""
    differences = []
    for name in _names(config):
        with contextlib.suppress(NotHFError):  # a classifier, which a language model does not have
            ours, theirs = (
                tied_modules(stack, find_outer_module(stack, name))[1:]
                for stack in (_tied(meta_twin(base)), _tied(meta_twin(recipient)))
            )
            if ours != theirs:
                here, there = (", ".join(others) or "no module" for others in (theirs, ours))
                differences.append(f"{name} shares its weight with {here} in the recipient, {there} in the base")
    return differences


def _names(config: DonorConfig) -> list[str]:
    """Return the modules that a donor holds, whole or rows of them."""
    return [*(config.modules_to_save or ()), *(config.trainable_token_indices or ())]


def base_stack(base: LiveBase | StoredBase) -> Stack:
    """Return the stack of a base; that of a stored one is on the meta device."""
    return base.stack if isinstance(base, LiveBase) else _tied(meta_twin(base.config, saved_class(base.config)))


def _tied(twin: Twin) -> Stack:
    """Return the stack of a twin that shares weights as its config says; one that is built within a load does not."""
    twin.model.tie_weights()
    return twin.stack


def _name_of_embeddings(stack: Stack) -> str:
    embeddings = stack.base_model.get_input_embeddings()
    path = next(path for path, module in stack.model.named_modules() if module is embeddings)
    return path.rpartition(".")[2]


def _stored_tensor(base: StoredBase, views: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Find a tensor by the names that it may have in a model with a head; files may omit that of the base model."""
    known = {name.removeprefix(f"{prefix}."): view for prefix in base.prefixes for name, view in views.items()}
    for name in names:
        for each in (name, *(name.removeprefix(f"{prefix}.") for prefix in base.prefixes)):
            if each in views or each in known:
                return views.get(each, known.get(each))
    raise NotHFError(f"{base.name} has no tensor {names[0]}; load it, and cut from the live model")
