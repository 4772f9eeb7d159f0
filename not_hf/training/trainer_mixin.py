"""The engine of `DonorTrainer`, for any trainer: hidden states at the entry of the organ are computed once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from not_hf.architecture.layers import eval_mode
from not_hf.architecture.partial_forward import router_loss_configs
from not_hf.architecture.stack import find_stack, is_encoder, layers_config
from not_hf.architecture.upstream import is_partitioned
from not_hf.cards.common import unite
from not_hf.errors import NotHFError
from not_hf.recipient.mixin import Recipient
from not_hf.recipient.trainer_card import gives_perplexity
from not_hf.training.checkpoints import last_complete_checkpoint, require_same_organs
from not_hf.training.chunked_loss import IGNORE_INDEX, next_labels
from not_hf.training.optimizers import MuonWithAdamW
from not_hf.training.prefix_cache import PrefixCache, prefix_folder
from not_hf.training.record import TrainingRecord, trained_organs
from not_hf.training.trained_stack import TrainedStack

MAX_PREFIX_BYTES = 32 * 2**30


class DonorTrainerMixin(Trainer):
    """What a trainer of organs does, whatever its loss: name it before the trainer's class.

    Args:
        *trainer_args: Passed to the trainer.
        cache_prefix: As in `DonorTrainer`, like those that follow.
        prefix_dir: Folder of the cache.
        max_prefix_bytes: Its limit.
        prefix_dtype: dtype of its rows.
        optimizer: `None` or `"muon"`.
        **trainer_kwargs: Passed to the trainer.
    """

    _of_whole_models: tuple[str, ...] = ("cache_prefix",)  # options that need the whole model on one device
    # Of a batch; hidden states do not depend on them
    _beside_inputs: tuple[str, ...] = ("labels", "shift_labels", "skip_logits")

    def __init__(
        self,
        *trainer_args: Any,
        cache_prefix: bool = False,
        prefix_dir: str | os.PathLike[str] | None = None,
        max_prefix_bytes: int = MAX_PREFIX_BYTES,
        prefix_dtype: torch.dtype | None = None,
        optimizer: str | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if optimizer not in (None, "muon"):
            raise NotHFError(
                f"optimizer must be None or 'muon', got {optimizer!r}; choose others by TrainingArguments(optim=...)"
            )
        if max_prefix_bytes < 0:
            raise NotHFError(f"max_prefix_bytes must be 0 or more, got {max_prefix_bytes}")
        prefixes = prefix_folder(prefix_dir) if cache_prefix else None
        super().__init__(*trainer_args, **trainer_kwargs)
        if optimizer and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            raise NotHFError(
                f"optimizer={optimizer!r} makes the optimizer; leave out either it, or optimizers and "
                "optimizer_cls_and_kwargs"
            )
        self._uses_muon = optimizer == "muon"
        self.cache_prefix = cache_prefix
        self._prefix_options: dict[str, Any] = {
            "folder": prefixes,
            "max_bytes": max_prefix_bytes,
            "dtype": prefix_dtype,
            "mixed_precision": str(self.accelerator.mixed_precision),
        }
        find_stack(self._native)  # raises now rather than in the first step
        self._chooses_tokens = self.args.include_num_input_tokens_seen == "no"
        if self._chooses_tokens:
            self.args.include_num_input_tokens_seen = "all"  # for `tokens_seen` in the organs' configs
        self._noted: TrainingRecord | None = None  # of the last training, which resumed from `_checkpoint`
        self._checkpoint: str | None = None
        self._stack: TrainedStack | None = None

    @property
    def _native(self) -> PreTrainedModel:
        """The model without PEFT's wrapper."""
        model: Any = self.model
        native = model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: None)()
        if not isinstance(native, PreTrainedModel):
            raise NotHFError(f"{type(self).__name__} needs a model of transformers, got {type(model).__name__}")
        if native.get_output_embeddings() is None:
            raise NotHFError(f"{type(self).__name__} needs a language model, got {type(native).__name__}; use Trainer")
        return native

    @property
    def _record(self) -> TrainingRecord:
        if self._noted is None:
            self._noted = TrainingRecord(self._native, self._checkpoint)
        return self._noted

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`. `resume_from_checkpoint=True` resumes from the last complete checkpoint.

        Raises:
            NotHFError: There is none, or it is of other organs.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise NotHFError(f"no complete checkpoint in {self.args.output_dir}; leave out resume_from_checkpoint")
        if resume_from_checkpoint:
            require_same_organs(self._native, resume_from_checkpoint)
        self._checkpoint = resume_from_checkpoint or None
        is_later = getattr(self, "model_init", None) is not None  # then the model is not there yet
        self._noted = None if is_later else TrainingRecord(self._native, self._checkpoint)
        self._stack = None  # weights below the organ may have changed since the last run
        before = self.state
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self.state is not before:  # after Ctrl-C too, since the organs have learned until then
                self.note_tokens()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in `Trainer`; Muon's options are those of the arguments now, as others' are."""
        if self._uses_muon:
            given = self.args
            options: dict[str, Any] = {"lr": given.learning_rate, "weight_decay": given.weight_decay}
            options |= {"betas": (given.adam_beta1, given.adam_beta2), "eps": given.adam_epsilon}
            self.optimizer_cls_and_kwargs = (cast(Any, MuonWithAdamW), options)
        return super().create_optimizer(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As in `Trainer`, but none after the last step, beyond which it would go if it resumes there."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self._chooses_tokens and batches:  # those to count; a mask of another shape does not tell
            is_masked = all(getattr(batch.get("attention_mask"), "ndim", 0) == 2 for batch in batches)
            self.args.include_num_input_tokens_seen = "non_padding" if is_masked else "all"
        return batches, count

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; updates `metrics` in the organs' configs if no other dataset is given.

        They are perplexities, and so none if the loss is another one or something is added to it.
        """
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if (eval_dataset is None or isinstance(eval_dataset, str)) and gives_perplexity(self, self._native):
            self._record.add_evaluation(self._native, self.state.global_step, metrics)
            self.note_tokens()
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`."""
        if not self.is_in_train and self._stack is not None and self._stack.prefix is not None:
            self._stack.prefix.forget()  # weights below the organ may have been changed through `.data`
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in the trainer, starting at the organ's entry where hidden states are cached."""
        if self.args.n_gpu > 1 or is_split_up(self._native):
            if any(getattr(self, name) for name in self._of_whole_models):
                raise NotHFError(
                    f"{' and '.join(self._of_whole_models)} can only be used with the whole model on one device in "
                    "each process; leave that out with FSDP, ZeRO-3, offloading and DataParallel"
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.cache_prefix and router_loss_configs(self._native):
            raise NotHFError(
                "cache_prefix skips the layers below the organ, but the router loss is of all layers; use "
                "cache_prefix=False, or turn that loss off: model.config.output_router_logits = False (in TRL "
                "router_aux_loss_coef=0.0)"
            )
        if self.cache_prefix and self._has_trained_prompt:
            raise NotHFError(
                "cache_prefix stores what depends on tokens alone, but PEFT's prompt learning puts trained vectors "
                "before them; use cache_prefix=False, or LoRA"
            )
        stack = self._current_stack()
        batch = {name: value for name, value in inputs.items() if name not in self._beside_inputs}
        hidden = None
        if stack.prefix is not None:
            with self.accelerator.autocast():  # which acts in the forward pass of PEFT's model, not of the one in it
                hidden = stack.prefix.hidden(batch, self._counted(inputs))
        return self._loss_from(hidden, stack, model, inputs, return_outputs, num_items_in_batch)

    @property
    def _has_trained_prompt(self) -> bool:
        """Whether PEFT puts vectors before the tokens, or before the keys and values of each layer."""
        return bool(getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False))

    def _counted(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Whether each position of a batch has a label to predict, `(batch, seq)`; `None` without labels."""
        labels = inputs.get("shift_labels")
        if labels is None and (labels := inputs.get("labels")) is None:
            return None
        is_own = "shift_labels" not in inputs and not is_encoder(layers_config(self._native.config))
        return (next_labels(labels) if is_own else labels) != IGNORE_INDEX

    def _loss_from(
        self,
        hidden: torch.Tensor | None,
        stack: TrainedStack,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Any:
        """Compute the trainer's loss.

        Args:
            hidden: Hidden states at the organ's entry, `(batch, seq, hidden)`; `None` if they are not known.
            stack: Layers of the model.
            model: The model as wrapped for training.
            inputs: A batch.
            return_outputs: Return the model's outputs too.
            num_items_in_batch: Tokens to divide the sum by; `None`: those of this batch.
        """
        with stack.starting_at(hidden) if self._has_trained_prompt else stack.learning_at(hidden):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @contextlib.contextmanager
    def _without_donors(self, stack: TrainedStack, hidden: torch.Tensor | None) -> Iterator[None]:
        """Make forward passes in the block those of the base, in eval mode.

        They start at the entry if the layers below it and the modules beside them are the same.

        Args:
            stack: Layers of the model.
            hidden: Hidden states at the organ's entry, if they are known.
        """
        native: Any = self._native
        with native.disable_donors(), eval_mode(native):
            shared = list(stack.forward.stack.layers)[: stack.entry] == stack.layers[: stack.entry]
            with stack.starting_at(hidden if shared and stack.outside_stands else None):
                yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; updates `tokens_seen` and `metrics` in the organs' configs."""
        self.note_tokens()
        super().save_model(output_dir, _internal_call)

    def note_tokens(self) -> None:
        """Write into the organs' configs how many tokens they were trained on, and what was measured of them.

        Tokens include those of earlier trainings.
        """
        state = self.state
        is_best = self.args.load_best_model_at_end and not self.is_in_train and state.best_model_checkpoint
        step = (state.best_global_step or 0) if is_best else state.global_step
        self._record.note_tokens(self._native, state, step)
        if step:
            self._record.note_evaluations(self._native, step)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; `dataset`, `language` and `tags` go into the organ's card, which is completed."""
        for config in trained_organs(self._native).values():
            config.datasets = unite(config.datasets, kwargs.get("dataset_tags") or kwargs.get("dataset")) or None
        return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer` for models without organs; the card of an organ is saved with it, and completed here."""
        if isinstance(self.model, Recipient) or not isinstance(self._native, Recipient):
            super().create_model_card(*args, **kwargs)

    def _current_stack(self) -> TrainedStack:
        """Describe the model's layers, anew if they have changed, and keep frozen modules in eval mode.

        The modules between the model and its layers are in eval mode, too: some have dropout in their forward pass.
        """
        native, stack = self._native, self._stack
        if stack is None or not stack.is_current(native):
            stack = TrainedStack.of(native)
        if native.training:
            for module in stack.frozen:
                module.eval()
            for module in stack.around[1:]:  # their layers keep their mode
                module.training = False
            if self.neftune_noise_alpha is not None:  # the noise is a hook of the embeddings, off in eval mode
                native.get_input_embeddings().train()
        if self.cache_prefix and stack.prefix is None and (native.training or 0 < stack.entry < len(stack.layers)):
            prefix = PrefixCache(stack.forward, stack.entry, stack.below, stack.around, **self._prefix_options)
            stack = dataclasses.replace(stack, prefix=prefix)
        self._stack = stack
        return stack


def is_split_up(module: nn.Module) -> bool:
    """Whether a module's parameters are sharded over processes (FSDP2, ZeRO-3) or offloaded."""
    return is_partitioned(module) or any(isinstance(p, DTensor) or p.is_meta for p in module.parameters())
