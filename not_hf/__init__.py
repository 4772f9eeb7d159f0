"""Neural Organ Transplantation (arXiv 2601.13580) for Hugging Face transformers.

Importing the package registers donors with the AutoClasses; nothing else happens.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from not_hf.compatibility import check_compatibility
from not_hf.config import DonorConfig
from not_hf.donor import DonorModel
from not_hf.errors import CorruptDonorError, IncompatibleDonorError, NotHFError, UnsupportedArchitectureError
from not_hf.tokenizer import DonorTokenizer
from not_hf.transplant import TransplantedForCausalLM
from not_hf.version import __version__

if TYPE_CHECKING:
    from not_hf.evaluation import perplexity

AutoConfig.register(DonorConfig.model_type, DonorConfig, exist_ok=True)
AutoModel.register(DonorConfig, DonorModel, exist_ok=True)
AutoModelForCausalLM.register(DonorConfig, TransplantedForCausalLM, exist_ok=True)
AutoTokenizer.register(DonorConfig, DonorTokenizer, exist_ok=True)

__all__ = [
    "CorruptDonorError",
    "DonorConfig",
    "DonorModel",
    "IncompatibleDonorError",
    "NotHFError",
    "TransplantedForCausalLM",
    "UnsupportedArchitectureError",
    "__version__",
    "check_compatibility",
    "perplexity",
]


def __getattr__(name: str) -> Any:
    """Load on first use what would make the import slow."""
    if name == "perplexity":
        from not_hf.evaluation import perplexity

        return perplexity
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
