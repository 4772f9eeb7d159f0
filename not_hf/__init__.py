"""Neural Organ Transplantation (arXiv 2601.13580) for Hugging Face transformers.

Importing the package registers donors with the AutoClasses and does nothing else. Its names are imported on first use,
so that `import not_hf` is as fast as `import transformers`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from not_hf.errors import CorruptDonorError, IncompatibleDonorError, NotHFError, UnsupportedArchitectureError
from not_hf.registration import register_config
from not_hf.version import __version__

if TYPE_CHECKING:
    from not_hf.cards.merged import merged_card
    from not_hf.composition.check import check_donor
    from not_hf.composition.plan import compose
    from not_hf.composition.publish import push_donor
    from not_hf.composition.sources import OrganSource
    from not_hf.config import DonorConfig
    from not_hf.donor.averaging import average_donors
    from not_hf.donor.compatibility import check_compatibility
    from not_hf.donor.importing import import_checkpoint
    from not_hf.donor.modeling import DonorModel
    from not_hf.evaluation.canaries import plant_canaries
    from not_hf.evaluation.comparison import compare_perplexity
    from not_hf.evaluation.method_comparison import compare_methods
    from not_hf.evaluation.perplexity import perplexity
    from not_hf.evaluation.position_sweep import sweep_positions
    from not_hf.evaluation.position_training import train_positions
    from not_hf.evaluation.privacy_probe import probe_privacy
    from not_hf.evaluation.scale_choice import choose_scale
    from not_hf.hub.search import list_donors
    from not_hf.recipient.expansion import expand
    from not_hf.recipient.heads import (
        TransplantedForCausalLM,
        TransplantedForImageTextToText,
        TransplantedForMaskedLM,
        TransplantedForMultimodalLM,
        TransplantedForQuestionAnswering,
        TransplantedForSequenceClassification,
        TransplantedForTokenClassification,
        TransplantedModel,
    )
    from not_hf.recipient.lora import LoraMatrix, from_lora, to_lora
    from not_hf.recipient.merging import merge_donor
    from not_hf.recipient.reference import reference_model
    from not_hf.training.chat import tokenize_chat
    from not_hf.training.curve import TrainingCurve, plot_training_curve
    from not_hf.training.data import load_text, pack
    from not_hf.training.isolation import require_isolation
    from not_hf.training.optimizers import MuonWithAdamW
    from not_hf.training.progress import ProgressLine
    from not_hf.training.span_choice import choose_span
    from not_hf.training.trainer import DonorTrainer
    from not_hf.training.trl_trainers import DonorDPOTrainer, DonorSFTTrainer

_LAZY = {
    "DonorConfig": "not_hf.config",
    "DonorDPOTrainer": "not_hf.training.trl_trainers",
    "DonorModel": "not_hf.donor.modeling",
    "DonorSFTTrainer": "not_hf.training.trl_trainers",
    "DonorTrainer": "not_hf.training.trainer",
    "LoraMatrix": "not_hf.recipient.lora",
    "MuonWithAdamW": "not_hf.training.optimizers",
    "OrganSource": "not_hf.composition.sources",
    "ProgressLine": "not_hf.training.progress",
    "TrainingCurve": "not_hf.training.curve",
    "TransplantedForCausalLM": "not_hf.recipient.heads",
    "TransplantedForImageTextToText": "not_hf.recipient.heads",
    "TransplantedForMaskedLM": "not_hf.recipient.heads",
    "TransplantedForMultimodalLM": "not_hf.recipient.heads",
    "TransplantedForQuestionAnswering": "not_hf.recipient.heads",
    "TransplantedForSequenceClassification": "not_hf.recipient.heads",
    "TransplantedForTokenClassification": "not_hf.recipient.heads",
    "TransplantedModel": "not_hf.recipient.heads",
    "average_donors": "not_hf.donor.averaging",
    "check_compatibility": "not_hf.donor.compatibility",
    "check_donor": "not_hf.composition.check",
    "choose_scale": "not_hf.evaluation.scale_choice",
    "choose_span": "not_hf.training.span_choice",
    "compare_methods": "not_hf.evaluation.method_comparison",
    "compare_perplexity": "not_hf.evaluation.comparison",
    "compose": "not_hf.composition.plan",
    "expand": "not_hf.recipient.expansion",
    "from_lora": "not_hf.recipient.lora",
    "import_checkpoint": "not_hf.donor.importing",
    "list_donors": "not_hf.hub.search",
    "load_text": "not_hf.training.data",
    "merge_donor": "not_hf.recipient.merging",
    "merged_card": "not_hf.cards.merged",
    "pack": "not_hf.training.data",
    "perplexity": "not_hf.evaluation.perplexity",
    "plant_canaries": "not_hf.evaluation.canaries",
    "plot_training_curve": "not_hf.training.curve",
    "probe_privacy": "not_hf.evaluation.privacy_probe",
    "push_donor": "not_hf.composition.publish",
    "reference_model": "not_hf.recipient.reference",
    "require_isolation": "not_hf.training.isolation",
    "sweep_positions": "not_hf.evaluation.position_sweep",
    "to_lora": "not_hf.recipient.lora",
    "tokenize_chat": "not_hf.training.chat",
    "train_positions": "not_hf.evaluation.position_training",
}

__all__ = [
    "CorruptDonorError",
    "DonorConfig",
    "DonorDPOTrainer",
    "DonorModel",
    "DonorSFTTrainer",
    "DonorTrainer",
    "IncompatibleDonorError",
    "LoraMatrix",
    "MuonWithAdamW",
    "NotHFError",
    "OrganSource",
    "ProgressLine",
    "TrainingCurve",
    "TransplantedForCausalLM",
    "TransplantedForImageTextToText",
    "TransplantedForMaskedLM",
    "TransplantedForMultimodalLM",
    "TransplantedForQuestionAnswering",
    "TransplantedForSequenceClassification",
    "TransplantedForTokenClassification",
    "TransplantedModel",
    "UnsupportedArchitectureError",
    "__version__",
    "average_donors",
    "check_compatibility",
    "check_donor",
    "choose_scale",
    "choose_span",
    "compare_methods",
    "compare_perplexity",
    "compose",
    "expand",
    "from_lora",
    "import_checkpoint",
    "list_donors",
    "load_text",
    "merge_donor",
    "merged_card",
    "pack",
    "perplexity",
    "plant_canaries",
    "plot_training_curve",
    "probe_privacy",
    "push_donor",
    "reference_model",
    "require_isolation",
    "sweep_positions",
    "to_lora",
    "tokenize_chat",
    "train_positions",
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
