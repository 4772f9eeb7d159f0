"""The version, in the one place both the package and its build read it from; and how to install the package."""

from importlib.metadata import version

__version__ = "0.1.0"

# From its repository, the source in [project.urls], as no package index has it yet
INSTALL = "pip install git+https://github.com/not-hf/not_hf"


def versions(*packages: str) -> dict[str, str]:
    """The versions of this package, which need not be installed, of PyTorch, transformers and others."""
    return {"not_hf": __version__, **{name: version(name) for name in ("torch", "transformers", *packages)}}
