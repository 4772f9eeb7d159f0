"""`DonorTrainer`: a `transformers.Trainer` that computes once what stays the same while an organ is trained.

Losses and organs are those of the plain `Trainer`, in less time and memory.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from not_hf.architecture.stack import find_stack
from not_hf.architecture.upstream import is_partitioned
from not_hf.cards.common import unite
from not_hf.errors import NotHFError
from not_hf.recipient.mixin import Recipient
from not_hf.training.checkpoints import last_complete_checkpoint
from not_hf.training.chunked_loss import IGNORE_INDEX, summed_loss
from not_hf.training.optimizers import MuonWithAdamW
from not_hf.training.prefix_cache import PrefixCache, prefix_folder
from not_hf.training.record import TrainingRecord, trained_organs
from not_hf.training.trained_stack import TrainedStack, is_trainable

MAX_PREFIX_BYTES = 32 * 2**30
_MAX_LOGITS = 2**24  # in memory at once; 64 MiB in float32
_LAST_TOKEN = torch.tensor([-1])  # `logits_to_keep=1` lets the last layers of Gemma 4 run on that token alone


class DonorTrainer(Trainer):
    """A `transformers.Trainer` for organs, faster and in less memory because the base is frozen.

    Arguments, callbacks, optimizers, schedules, checkpoints, trackers and distributed training are those of `Trainer`.
    One thing differs: frozen modules below the organ stay in eval mode, so their dropout is off.

    Args:
        *trainer_args: Passed to `Trainer`.
        cache_prefix: Store the hidden states at the organ's entry on disk, by the tokens they belong to, and start
            there whenever all rows of a batch are stored: in later epochs, later runs and evaluation. Useful when data
            is seen more than once. Losses are bit-identical in float32 on a CPU, except for mixtures of experts, where
            the rounding of a token depends on the other tokens in its batch.
        prefix_dir: Folder to store them in, with nothing else in it; `None`: `assets/not_hf/prefixes` in the Hub's
            cache. Each base, position and set of library versions has a subfolder.
        max_prefix_bytes: Limit for all subfolders together. The least recently used are deleted first; when there are
            no others, no more is stored.
        prefix_dtype: dtype to store them in; `None`: as computed, without rounding. `torch.bfloat16` halves the size
            of float32.
        head_chunk: Maximum number of tokens whose logits are in memory at once; 0: all, as in `Trainer`; `None`: as
            many as take 64 MiB.
        optimizer: `None`: as in `TrainingArguments`; `"muon"`: Muon for matrices and AdamW for the rest, with the
            learning rate, weight decay, betas and epsilon of `TrainingArguments`.
        kl_weight: Factor of KL(base ‖ model), the mean over tokens in nats, which is added to the training loss; it
            keeps predictions close to those of the model without its organs.
        **trainer_kwargs: Passed to `Trainer`.

    Raises:
        NotHFError: An option does not work with this model. `train` and `evaluate` raise it too, for what only shows
            there.
        UnsupportedArchitectureError: The layers of the model cannot be found.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from not_hf import DonorModel, DonorTrainer, TransplantedForCausalLM
        >>> shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4))
        >>> donor = DonorModel.from_base(base, layers=(2, 4), mode="replace")
        >>> model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="counting", is_trainable=True)
        >>> blocks = [{"input_ids": [*range(n, n + 9)], "labels": [*range(n, n + 9)]} for n in range(32)]
        >>> folder = tempfile.mkdtemp()
        >>> trainer = DonorTrainer(
        ...     model,
        ...     TrainingArguments(folder, max_steps=5, learning_rate=0.01, save_strategy="no", disable_tqdm=True),
        ...     train_dataset=blocks,
        ...     cache_prefix=True,
        ...     prefix_dir=f"{folder}/prefixes",
        ... )
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        5
        >>> model.save_pretrained(f"{folder}/organ")  # the organ's layers only
    """

    def __init__(
        self,
        *trainer_args: Any,
        cache_prefix: bool = False,
        prefix_dir: str | os.PathLike[str] | None = None,
        max_prefix_bytes: int = MAX_PREFIX_BYTES,
        prefix_dtype: torch.dtype | None = None,
        head_chunk: int | None = None,
        optimizer: str | None = None,
        kl_weight: float = 0.0,
        **trainer_kwargs: Any,
    ) -> None:
        if optimizer not in (None, "muon"):
            raise NotHFError(
                f"optimizer must be None or 'muon', got {optimizer!r}; choose others by TrainingArguments(optim=...)"
            )
        numbers = {"kl_weight": kl_weight, "head_chunk": head_chunk or 0, "max_prefix_bytes": max_prefix_bytes}
        for name, value in numbers.items():
            if value < 0:
                raise NotHFError(f"{name} must be 0 or more, got {value}")
        prefixes = prefix_folder(prefix_dir) if cache_prefix else None
        super().__init__(*trainer_args, **trainer_kwargs)
        if optimizer == "muon":
            args = self.args
            options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            self.optimizer_cls_and_kwargs = (cast(Any, MuonWithAdamW), options)
        self.cache_prefix, self.head_chunk, self.kl_weight = cache_prefix, head_chunk, kl_weight
        self._prefix_options: dict[str, Any] = {
            "folder": prefixes,
            "max_bytes": max_prefix_bytes,
            "dtype": prefix_dtype,
            "mixed_precision": str(self.accelerator.mixed_precision),
        }
        find_stack(self._native)  # raises now rather than in the first step
        if kl_weight and (not isinstance(self._native, Recipient) or self._native._surgery.is_scaffold):
            raise NotHFError(
                "kl_weight compares the model with its base, so it needs a model with organs and layers of its own; "
                "use kl_weight=0"
            )
        if self.args.include_num_input_tokens_seen == "no":
            self.args.include_num_input_tokens_seen = "all"  # for `tokens_seen` in the organs' configs
        self._record = TrainingRecord(self._native)
        self._stack: TrainedStack | None = None
        self._prediction_loss_only = True

    @property
    def _native(self) -> PreTrainedModel:
        """The model without PEFT's wrapper."""
        model: Any = self.model
        native = model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: None)()
        if not isinstance(native, PreTrainedModel):
            raise NotHFError(f"DonorTrainer needs a model of transformers, got {type(model).__name__}")
        if native.get_output_embeddings() is None:
            raise NotHFError(f"DonorTrainer needs a language model, got {type(native).__name__}; use Trainer")
        return native

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`. `resume_from_checkpoint=True` resumes from the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise NotHFError(f"no complete checkpoint in {self.args.output_dir}; leave out resume_from_checkpoint")
        self._stack = None  # weights below the organ may have changed since the last run
        trained = super().train(resume_from_checkpoint, *args, **kwargs)
        self.note_tokens()
        return trained

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; updates `metrics` in the organs' configs if no other dataset is given."""
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is None or isinstance(eval_dataset, str):
            self._record.add_evaluation(self.state.global_step, metrics)
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
        """As in `Trainer`, starting at the organ's entry where hidden states are cached, and without all logits."""
        if self.args.n_gpu > 1 or is_split_up(self._native):
            if self.cache_prefix or self.kl_weight:
                raise NotHFError(
                    "cache_prefix and kl_weight need the whole model on one device in each process; "
                    "leave them out with FSDP, ZeRO-3, offloading and DataParallel"
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        stack = self._current_stack()
        batch = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        hidden = None if stack.prefix is None else stack.prefix.hidden(batch)
        is_chunked = self._loss_is_chunked(stack, inputs, return_outputs)
        base_hidden = None
        if self.kl_weight and model.training:
            if not is_chunked:
                raise NotHFError(
                    "kl_weight needs the chunked loss, which head_chunk=0, label smoothing, a loss "
                    "function of your own or a trainable head turn off; use kl_weight=0 or leave those out"
                )
            base_hidden = self._base_hidden(stack, batch, hidden)
        with stack.starting_at(hidden):
            if not is_chunked:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = self._chunked_loss(stack, model, inputs, base_hidden, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`."""
        self._prediction_loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._prediction_loss_only = True

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
        step = state.best_global_step if is_best else state.global_step
        self._record.note_tokens(self._native, state)
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
        """Describe the model's layers, anew if they have changed, and keep frozen modules in eval mode."""
        native, stack = self._native, self._stack
        if stack is None or not stack.is_current(native):
            stack = TrainedStack.of(native)
        if native.training:
            for module in stack.frozen:
                module.eval()
        if self.cache_prefix and stack.prefix is None and (native.training or 0 < stack.entry < len(stack.layers)):
            prefix = PrefixCache(stack.forward, stack.entry, stack.below, stack.around, **self._prefix_options)
            stack = dataclasses.replace(stack, prefix=prefix)
        self._stack = stack
        return stack

    def _loss_is_chunked(self, stack: TrainedStack, inputs: Mapping[str, Any], return_outputs: bool) -> bool:
        """Whether only the loss is needed, and can be computed without the logits of all tokens."""
        native: Any = self._native
        return (
            self.head_chunk != 0
            and "labels" in inputs
            and self.label_smoother is None
            and self.compute_loss_func is None
            and not (return_outputs and not self._prediction_loss_only)
            and native.loss_function is ForCausalLMLoss
            and not getattr(native.config, "output_router_logits", False)
            and "logits_to_keep" in inspect.signature(native.forward).parameters
            and not any(map(is_trainable, stack.outside))
        )

    def _chunked_loss(
        self,
        stack: TrainedStack,
        model: nn.Module,
        inputs: Mapping[str, Any],
        base_hidden: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Compute what `Trainer.compute_loss` does, a few tokens' logits at a time.

        Args:
            stack: Layers of the model.
            model: The model as wrapped for training.
            inputs: A batch with `labels`, and with `shift_labels` where something else shifted them.
            base_hidden: Output of the base's last layer for the KL term, `(batch, seq, hidden)`.
            num_items_in_batch: Tokens to divide the sum by; `None`: those of this batch.
        """
        batch = dict(inputs)
        labels, shift_labels = batch.pop("labels"), batch.pop("shift_labels", None)  # (batch, seq)
        with stack.forward.capturing_last() as last:
            model(**batch, logits_to_keep=_LAST_TOKEN, use_cache=False)
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        shift_labels = shift_labels.to(last[0].device)
        total, count = summed_loss(last[0], shift_labels, stack.forward.head, self._chunk, base_hidden, self.kl_weight)
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return total / count
        loss = total / num_items_in_batch
        if self.args.average_tokens_across_devices:  # the items of all processes, whose gradients are averaged
            loss *= self.accelerator.num_processes // self.get_tp_size()
        return loss

    @property
    def _chunk(self) -> int:
        """Tokens whose logits are in memory at once."""
        config = self._native.config
        context = getattr(config, "max_position_embeddings", None) or _MAX_LOGITS
        return min(self.head_chunk or max(1, _MAX_LOGITS // config.vocab_size), context)

    @torch.no_grad()
    def _base_hidden(self, stack: TrainedStack, batch: Mapping[str, Any], hidden: torch.Tensor | None) -> torch.Tensor:
        """Compute the output of the base's last layer, `(batch, seq, hidden)`.

        Args:
            stack: Layers of the model.
            batch: Inputs without labels.
            hidden: Hidden states at the organ's entry, if they are known.
        """
        native: Any = self._native
        with native.disable_donors():
            shared = list(stack.forward.stack.layers)[: stack.entry] == stack.layers[: stack.entry]
            with stack.starting_at(hidden if shared else None), stack.forward.capturing_last() as last:
                native(**batch, logits_to_keep=_LAST_TOKEN, use_cache=False)
        return last[0]


def is_split_up(module: nn.Module) -> bool:
    """Whether a module's parameters are sharded over processes (FSDP2, ZeRO-3) or offloaded."""
    return is_partitioned(module) or any(isinstance(p, DTensor) or p.is_meta for p in module.parameters())
