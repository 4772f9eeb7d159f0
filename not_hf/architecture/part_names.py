"""What `modules` may name of layers. Config files are checked with it, so it imports nothing of transformers."""

from __future__ import annotations

from typing import Any

Modules = str | list[str]  # "all", "outputs", "attention", "mlp", or names of modules

ALL = "all"
BRANCHES = {"attention": ("attention", "mixer"), "mlp": ("mlp",)}
KEYWORDS = (ALL, "outputs", *BRANCHES)


def is_path(name: Any) -> bool:
    """Whether a value can be the path of a module, or the end of one: identifiers with dots between them."""
    return isinstance(name, str) and all(map(str.isidentifier, name.split(".")))


def parts_problem(modules: Any) -> str | None:
    """Say why `modules` chooses no parts of layers; `None` if it does."""
    if modules in KEYWORDS or (isinstance(modules, list) and modules and all(map(is_path, modules))):
        return None
    return f"modules must be one of {KEYWORDS} or a list of names of modules in a layer, got {modules!r:.200}"
