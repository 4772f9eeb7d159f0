"""The card of organs that a `Trainer` pushes: the one that was saved with them, completed."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import CONFIG_NAME

from not_hf.architecture.partial_forward import router_loss_configs
from not_hf.cards.common import README, unite
from not_hf.cards.donor import updated_card
from not_hf.cards.metrics import perplexities, trainer_metrics
from not_hf.config import DonorConfig
from not_hf.hub.headers import size_of
from not_hf.hub.partial_download import list_tensors
from not_hf.recipient.mixin import Recipient

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.trainer_callback import TrainerState


def complete_card(
    trainer: Any,
    *,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    **unused: Any,
) -> None:
    """Complete the card in a trainer's output folder for its repo, where organs were saved there.

    Args:
        trainer: The trainer.
        language: As in `Trainer.create_model_card`, like the others. Names of datasets go into the config too.
    """
    folder = str(trainer.args.output_dir)
    if not os.path.exists(os.path.join(folder, CONFIG_NAME)):
        return
    config = DonorConfig.from_pretrained(folder)
    if config.donors is None:
        config.datasets = unite(config.datasets, dataset_tags or dataset) or None
        if gives_perplexity(trainer, trainer.model):
            config.metrics = config.metrics or _evaluations(trainer)
        config.save_pretrained(folder)
    places = ["."] if config.donors is None else [each["subfolder"] for each in config.donors if "donor" not in each]
    tensors = [tensor for place in places for tensor in list_tensors(os.path.join(folder, place)).values()]
    num_parameters, size = sum(tensor.parameter_count for tensor in tensors), sum(map(size_of, tensors))
    card = updated_card(folder, config, num_parameters, size, trainer.hub_model_id)
    data: Any = card.data
    data.tags = unite(data.tags, "generated_from_trainer", tags)
    data.language = language or data.language
    data.license = license or data.license
    card.save(Path(folder, README))


def gives_perplexity(trainer: Any, model: PreTrainedModel) -> bool:
    """Whether the exponential of a trainer's evaluation loss is a perplexity: that of tokens, and nothing added to it.

    Args:
        trainer: The trainer.
        model: Its model, without PEFT's wrapper.
    """
    is_known = trainer.compute_loss.__module__.partition(".")[0] in ("transformers", "trl", "not_hf")
    return (
        is_known
        and trainer.compute_loss_func is None
        and trainer.label_smoother is None
        and getattr(trainer.args, "loss_type", "nll") == "nll"  # of TRL
        and not router_loss_configs(model)
        and not getattr(model, "z_loss_coefficient", 0)
        and model.get_output_embeddings() is not None
    )


def _evaluations(trainer: Any) -> dict[str, Any] | None:
    """Return what a training measured of the weights that it left.

    Without that, what was measured after it, unless that was twice with different results: the model may then have
    had its organs switched off, of which a log says nothing.
    """
    state: TrainerState = trainer.state
    step = (state.best_global_step if trainer.args.load_best_model_at_end else None) or state.global_step
    found: dict[str, set[float]] = {}
    for logs in state.log_history:
        if logs.get("step") == step:
            for name, value in perplexities(logs):
                found.setdefault(name, set()).add(value)
        if found and "train_runtime" in logs:
            break
    return trainer_metrics({name: value for name, (value, *others) in found.items() if not others})


@functools.cache
def _replace_trainer_card() -> None:
    """Have `Trainer.create_model_card` complete the card of organs; `Trainer` has no hook for it."""
    from transformers import Trainer

    native = Trainer.create_model_card

    @functools.wraps(native)
    def create_model_card(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not isinstance(trainer.model, Recipient):
            native(trainer, *args, **kwargs)
        elif trainer.is_world_process_zero():
            _, *given = inspect.signature(native).bind(trainer, *args, **kwargs).arguments.items()
            complete_card(trainer, **dict(given))

    Trainer.create_model_card = create_model_card  # type: ignore


def keep_card_from_trainers() -> None:
    """Have `Trainer.push_to_hub` complete the card of organs; it would write its own over it.

    Nothing is done, and nothing imported, where `Trainer` is not in use.
    """
    if "transformers.trainer" in sys.modules:
        _replace_trainer_card()
