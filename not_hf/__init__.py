"""Neural Organ Transplantation (arXiv 2601.13580) for Hugging Face transformers.

Importing the package registers donors with the AutoClasses; nothing else happens. What it exports is imported on
first use, so that `import not_hf` costs no more than `import transformers`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from not_hf.errors import CorruptDonorError, IncompatibleDonorError, NotHFError, UnsupportedArchitectureError
from not_hf.registration import register_config
from not_hf.version import __version__

if TYPE_CHECKING:
    from not_hf.averaging import average_donors
    from not_hf.compatibility import check_compatibility
    from not_hf.config import DonorConfig
    from not_hf.donor import DonorModel
    from not_hf.entries import OrganSource
    from not_hf.evaluation import perplexity
    from not_hf.finding import list_donors
    from not_hf.importing import import_checkpoint
    from not_hf.planning import compose
    from not_hf.reference import reference_model
    from not_hf.spans import choose_span
    from not_hf.trainer import DonorTrainer
    from not_hf.transplant import TransplantedForCausalLM, TransplantedForMaskedLM

_LAZY = {
    "DonorConfig": "not_hf.config",
    "DonorModel": "not_hf.donor",
    "DonorTrainer": "not_hf.trainer",
    "OrganSource": "not_hf.entries",
    "TransplantedForCausalLM": "not_hf.transplant",
    "TransplantedForMaskedLM": "not_hf.transplant",
    "average_donors": "not_hf.averaging",
    "check_compatibility": "not_hf.compatibility",
    "choose_span": "not_hf.spans",
    "compose": "not_hf.planning",
    "import_checkpoint": "not_hf.importing",
    "list_donors": "not_hf.finding",
    "perplexity": "not_hf.evaluation",
    "reference_model": "not_hf.reference",
}

__all__ = [
    "CorruptDonorError",
    "DonorConfig",
    "DonorModel",
    "DonorTrainer",
    "IncompatibleDonorError",
    "NotHFError",
    "OrganSource",
    "TransplantedForCausalLM",
    "TransplantedForMaskedLM",
    "UnsupportedArchitectureError",
    "__version__",
    "average_donors",
    "check_compatibility",
    "choose_span",
    "compose",
    "import_checkpoint",
    "list_donors",
    "perplexity",
    "reference_model",
]

register_config()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
