"""`DonorTrainer`: a `transformers.Trainer` that computes once what stays the same while an organ is trained.

Losses and organs are those of the plain `Trainer`, in less time and memory.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from not_hf.architecture.partial_forward import router_loss_configs
from not_hf.architecture.stack import layers_config
from not_hf.errors import NotHFError
from not_hf.recipient.mixin import Recipient
from not_hf.training.chunked_loss import next_labels, summed_loss
from not_hf.training.trained_stack import TrainedStack, is_trainable
from not_hf.training.trainer_mixin import MAX_PREFIX_BYTES, DonorTrainerMixin

_MAX_LOGITS = 2**24  # in memory at once; 64 MiB in float32
_MAX_LOGITS_ON_GPU = 2**27  # where small chunks are slow: each is a pass through the model's own forward
_LAST_TOKEN = torch.tensor([-1])  # `logits_to_keep=1` lets the last layers of Gemma 4 run on that token alone


class DonorTrainer(DonorTrainerMixin):
    """A `transformers.Trainer` for organs, faster and in less memory because the base is frozen.

    Arguments, callbacks, optimizers, schedules, checkpoints, trackers and distributed training are those of `Trainer`.
    One thing differs: frozen modules below the organ stay in eval mode, as does the module that contains the layers.
    So their dropout and layerdrop are off.

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
            many as take 64 MiB, on a GPU 512 MiB.
        optimizer: `None`: as in `TrainingArguments`; `"muon"`: Muon for matrices and AdamW for the rest, with the
            learning rate, weight decay, betas and epsilon of `TrainingArguments`.
        kl_weight: Factor of KL(base ‖ model), the mean over tokens in nats, which is added to the training loss; it
            keeps predictions close to those of the model without its organs, whose dropout is off. Not for organs that
            hold modules beside their layers.
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

    _of_whole_models = ("cache_prefix", "kl_weight")

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
        for name, value in {"kl_weight": kl_weight, "head_chunk": head_chunk or 0}.items():
            if not value >= 0:  # nor NaN
                raise NotHFError(f"{name} must be 0 or more, got {value}")
        cache: dict[str, Any] = {"cache_prefix": cache_prefix, "prefix_dir": prefix_dir, "prefix_dtype": prefix_dtype}
        cache["max_prefix_bytes"] = max_prefix_bytes
        super().__init__(*trainer_args, **cache, optimizer=optimizer, **trainer_kwargs)
        self.head_chunk, self.kl_weight = head_chunk, kl_weight
        if kl_weight and (not isinstance(self._native, Recipient) or self._native._surgery.is_scaffold):
            raise NotHFError(
                "kl_weight compares the model with its base, so it needs a model with organs and layers of its own; "
                "use kl_weight=0"
            )
        self._prediction_loss_only = False

    def _loss_from(
        self,
        hidden: torch.Tensor | None,
        stack: TrainedStack,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Any:
        """Compute the loss of `Trainer`, without all logits."""
        is_chunked = self._loss_is_chunked(stack, inputs, return_outputs)
        base_hidden = None
        if self.kl_weight and model.training:
            if not is_chunked:
                raise NotHFError(
                    "kl_weight needs the chunked loss, which head_chunk=0, label smoothing, a loss function of your "
                    "own, a compute_loss that asks for outputs, a router loss, a z-loss, PEFT's prompt learning or a "
                    "trainable head turn off; use kl_weight=0 or leave those out"
                )
            batch = {name: value for name, value in inputs.items() if name not in self._beside_inputs}
            base_hidden = self._base_hidden(stack, batch, hidden)
        if not is_chunked:
            return super()._loss_from(hidden, stack, model, inputs, return_outputs, num_items_in_batch)
        with stack.learning_at(hidden):
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
            self._prediction_loss_only = False

    def _loss_is_chunked(self, stack: TrainedStack, inputs: Mapping[str, Any], return_outputs: bool) -> bool:
        """Whether only the loss is needed, and can be computed without the logits of all tokens."""
        native: Any = self._native
        is_overridden = getattr(self.compute_loss, "__func__", None) is not DonorTrainer.compute_loss
        return (
            self.head_chunk != 0
            and "labels" in inputs
            and self.label_smoother is None
            and self.compute_loss_func is None
            and (not return_outputs or (self._prediction_loss_only and not is_overridden))
            and native.loss_function is ForCausalLMLoss
            and not router_loss_configs(native)
            and not getattr(native, "z_loss_coefficient", 0)  # Bamba adds that loss after `loss_function`
            and not self._has_trained_prompt
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
        batch = {name: value for name, value in inputs.items() if name not in self._beside_inputs}
        labels, shift_labels = inputs["labels"], inputs.get("shift_labels")  # (batch, seq)
        with stack.forward.capturing_last() as last:
            model(**batch, logits_to_keep=_LAST_TOKEN, use_cache=False)
        self._native.get_input_embeddings().eval()  # passes through the head draw no noise (NEFTune)
        if shift_labels is None:
            shift_labels = next_labels(labels)
        shift_labels = shift_labels.to(last[0].device)

        def head(states: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                return stack.forward.head(states)

        total, count = summed_loss(last[0], shift_labels, head, self._chunk, base_hidden, self.kl_weight)
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return total / count
        loss = total / num_items_in_batch
        if self.args.average_tokens_across_devices:  # the items of all processes, whose gradients are averaged
            loss *= self.accelerator.num_processes // self.get_tp_size()
        return loss

    @property
    def _chunk(self) -> int:
        """Tokens whose logits are in memory at once."""
        config = layers_config(self._native.config)
        most = _MAX_LOGITS if self._native.device.type == "cpu" else _MAX_LOGITS_ON_GPU
        context = getattr(config, "max_position_embeddings", None) or most
        return min(self.head_chunk or max(1, most // config.vocab_size), context)

    @torch.no_grad()
    def _base_hidden(self, stack: TrainedStack, batch: Mapping[str, Any], hidden: torch.Tensor | None) -> torch.Tensor:
        """Compute the output of the base's last layer, `(batch, seq, hidden)`.

        Args:
            stack: Layers of the model.
            batch: Inputs without labels.
            hidden: Hidden states at the organ's entry, if they are known.
        """
        capturing = stack.forward.capturing_last()
        with self._without_donors(stack, hidden), capturing as last, self.accelerator.autocast():
            if not stack.outside_stands:
                raise NotHFError(
                    "kl_weight takes the base's predictions from the model's own head, but an organ holds modules "
                    "beside its layers; use kl_weight=0, or an organ without modules_to_save and "
                    "trainable_token_indices"
                )
            self._native(**batch, logits_to_keep=_LAST_TOKEN, use_cache=False)
        return last[0]
