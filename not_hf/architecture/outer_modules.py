"""Modules of a model beside its layers: embeddings, final norm, head."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.stack import Stack
from not_hf.errors import NotHFError


def find_outer_module(stack: Stack, name: str) -> str:
    """Find the module beside the layers that a name means, as in PEFT the end of its path.

    Returns:
        Its path in the model.

    Raises:
        NotHFError: There is none, or several.
    """
    paths = [path for path, _ in _outer_modules(stack)]
    found = [path for path in paths if path == name] or [path for path in paths if path.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise NotHFError(f"{name!r} means several modules; name one of {', '.join(found)}")
    raise NotHFError(f"the model has no module {name!r} beside its layers; it has {', '.join(paths) or 'none'}")


def tied_modules(stack: Stack, path: str) -> list[str]:
    """Find the modules beside the layers that share a parameter with the one at `path`, which is the first."""
    shared = {id(parameter) for parameter in stack.model.get_submodule(path).parameters()}
    others = [
        other
        for other, module in _outer_modules(stack)
        if other != path and any(id(parameter) in shared for parameter in module.parameters(recurse=False))
    ]
    return [path, *(other for other in others if not other.startswith(f"{path}."))]


def vocabulary_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the modules of a model that have a row for each token: its input and output embeddings."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            yield module


def _outer_modules(stack: Stack) -> Iterator[tuple[str, nn.Module]]:
    """Yield paths and modules that own or contain parameters, other than layers and what contains them."""
    inside = f"{stack.full_path}."
    for path, module in stack.model.named_modules():
        contains = not path or inside.startswith(f"{path}.")
        if not contains and not path.startswith(inside) and next(module.parameters(), None) is not None:
            yield path, module
