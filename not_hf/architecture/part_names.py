"""What `modules` may name of layers. Config files are checked with it, so it imports nothing of transformers."""

from __future__ import annotations

from typing import Any

Modules = str | list[str]  # "all", "outputs", "attention", "mlp", or names of modules

ALL = "all"
BRANCHES = {"attention": ("attention", "mixer"), "mlp": ("mlp",)}
KEYWORDS = (ALL, "outputs", *BRANCHES)


def parts_problem(modules: Any) -> str | None:
    """Say why `modules` chooses no parts of layers; `None` if it does."""
    if modules in KEYWORDS if isinstance(modules, str) else isinstance(modules, list) and modules:
        names = [modules] if isinstance(modules, str) else modules
        if all(isinstance(name, str) and name and all(map(str.isidentifier, name.split("."))) for name in names):
            return None
    return f"modules must be one of {KEYWORDS} or a list of names of modules in a layer, got {modules!r:.200}"
