"""The version, in the one place both the package and its build read it from; and how to install the package."""

__version__ = "0.1.0"

# From its repository, the source in [project.urls], as no package index has it yet
INSTALL = "pip install git+https://github.com/not-hf/not_hf"
