"""`DonorTrainer`: a `transformers.Trainer` that does not compute what a frozen base computes again and again.

Nothing about the result changes: losses and organs are those of the plain `Trainer`, faster and in less memory.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from not_hf.architecture.stack import find_stack
from not_hf.architecture.upstream import is_partitioned
from not_hf.config import DonorConfig
from not_hf.errors import NotHFError
from not_hf.recipient.mixin import Recipient
from not_hf.training.chunked_loss import IGNORED, summed_loss
from not_hf.training.optimizers import MuonWithAdamW
from not_hf.training.partial_forward import Partway
from not_hf.training.prefix_cache import FrozenPrefix, first_trainable, outside
from not_hf.training.progress import ProgressLine, TrainingCurve

MAX_PREFIX_BYTES = 32 * 2**30
_LOGITS_AT_ONCE = 2**24  # numbers; 64 MiB in float32
_LAST_TOKEN = torch.tensor([-1])  # `logits_to_keep=1` lets the last layers of Gemma 4 run on that token alone


class DonorTrainer(Trainer):
    """Trains organs: everything of `transformers.Trainer`, and what only a frozen base makes possible.

    Frozen modules below the organ stay in eval mode, so dropout of the base is off there. Besides, everything is as in
    `Trainer`: arguments, callbacks, optimizers, schedules, checkpoints, trackers, processes.

    Args:
        *trainer_args: As in `Trainer`.
        cache_prefix: Keep the hidden states at the organ's entry on disk, by the tokens they belong to, and start
            there whenever all rows of a batch have been seen before: in later epochs, in later runs, in evaluation.
            Worth it when data is seen more than once. Losses are bit-identical in float32 on a CPU, but for mixtures
            of experts, where each token's rounding depends on the tokens beside it.
        prefix_dir: Where they are kept; `None`: in the Hub's cache, under `assets/not_hf/prefixes`. What is kept for
            other bases, positions or library versions lies beside each other and is never mixed up.
        max_prefix_bytes: For all of them together. Those unused for longest are removed first; when there are no
            others, nothing more is kept, and what is not kept is computed.
        prefix_dtype: dtype they are kept in; `None`: as computed, so that nothing is rounded. `torch.bfloat16` halves
            the size of float32 ones.
        head_chunk: Tokens whose logits are in memory at once, at most; 0: all, as in `Trainer`; `None`: as many as
            make 64 MiB.
        optimizer: `None`: as `TrainingArguments` says; `"muon"`: Muon for the matrices and AdamW for the rest, with
            the arguments' rate, weight decay, betas and epsilon.
        kl_weight: Adds to the training loss this times KL(base ‖ model) of predictions, mean over tokens in nats; it
            holds the model to what the base says. The base is this model without its organs.
        **trainer_kwargs: As in `Trainer`.

    Raises:
        NotHFError: What is asked for cannot be had with this model; `train` and `evaluate` raise it too, for what
            shows only there.
        UnsupportedArchitectureError: The model has no stack of layers.
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
            raise NotHFError(f"optimizer {optimizer!r} is none of ours; use 'muon', or TrainingArguments(optim=...)")
        if kl_weight < 0 or (head_chunk is not None and head_chunk < 0) or max_prefix_bytes < 0:
            raise NotHFError("kl_weight, head_chunk and max_prefix_bytes are 0 or more")
        super().__init__(*trainer_args, **trainer_kwargs)
        if optimizer == "muon":
            args = self.args
            options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
            self.optimizer_cls_and_kwargs = (cast(Any, MuonWithAdamW), options)
        self._show_progress()
        self.cache_prefix, self.head_chunk, self.kl_weight = cache_prefix, head_chunk, kl_weight
        self._prefix_options = (Path(prefix_dir) if prefix_dir else None, max_prefix_bytes, prefix_dtype)
        find_stack(self._native)  # raises now rather than in the first step
        if kl_weight and (not isinstance(self._native, Recipient) or self._native._surgery.is_scaffold):
            raise NotHFError("kl_weight holds a model to its base; it needs a model with organs and layers of its own")
        if self.args.include_num_input_tokens_seen == "no":
            self.args.include_num_input_tokens_seen = "all"  # organs remember how many they were trained on
        self._tokens_before = {name: config.tokens_seen or 0 for name, config in self._organs().items()}
        self._parts: Partway | None = None
        self._prefix: FrozenPrefix | None = None
        self._state: tuple[Any, ...] = ()  # of the model, when it was looked up
        self._only_loss = True

    @property
    def _native(self) -> PreTrainedModel:
        """The model of transformers, inside of what PEFT may have put around it."""
        model: Any = self.model
        native = model if isinstance(model, PreTrainedModel) else getattr(model, "get_base_model", lambda: None)()
        if not isinstance(native, PreTrainedModel):
            raise NotHFError(f"DonorTrainer trains models of transformers, not {type(model).__name__}")
        return native

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`. `resume_from_checkpoint=True` goes on from the last checkpoint that was written whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise NotHFError(f"no whole checkpoint in {self.args.output_dir}; leave out resume_from_checkpoint")
        self._parts = None  # weights below the organ may be others than in the run before
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As in `Trainer`, from the organ's entry on where that is known, and without all logits at once."""
        if self.args.n_gpu > 1 or is_in_parts(self._native):
            if self.cache_prefix or self.kl_weight:
                raise NotHFError(
                    "cache_prefix and kl_weight need the whole model on one device in each process; "
                    "leave them out with FSDP, ZeRO-3, offloading and DataParallel"
                )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._settle()
        assert self._parts is not None
        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        hidden = None
        if self._prefix is not None:
            hidden = self._prefix.hidden(given)
        chunked = self._loss_is_chunked(inputs, return_outputs)
        base = None
        if self.kl_weight and model.training:
            if not chunked:
                raise NotHFError("kl_weight needs the chunked loss; see what keeps it off in DonorTrainer's docs")
            base = self._base_states(given, hidden)
        run = functools.partial(self._run_for_loss, model, base) if chunked else model
        with self._parts.running_from(self._entry, hidden) if hidden is not None else contextlib.nullcontext():
            return super().compute_loss(run, inputs, return_outputs, num_items_in_batch)  # type: ignore[arg-type]

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`."""
        self._only_loss = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._only_loss = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; the organs' configs say how many tokens they were trained on."""
        self.note_tokens()
        super().save_model(output_dir, _internal_call)

    def note_tokens(self) -> None:
        """Write into the organs' configs how many tokens they have been trained on, earlier trainings included."""
        for name, config in self._organs().items():
            if name in self._tokens_before and self.state.num_input_tokens_seen:
                config.tokens_seen = self._tokens_before[name] + int(self.state.num_input_tokens_seen)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing where there are organs: their card is saved with them. Else as in `Trainer`."""
        if not isinstance(self._native, Recipient):
            super().create_model_card(*args, **kwargs)

    def _show_progress(self) -> None:
        """A line of ours in the place of the Trainer's bar, and a picture at the end."""
        for theirs in (ProgressCallback, PrinterCallback):
            if self.pop_callback(theirs) is not None:
                self.add_callback(ProgressLine())
        self.add_callback(TrainingCurve())

    def _settle(self) -> None:
        """Look the model up anew if its layers have changed; keep what is frozen below the organ in eval mode."""
        native = self._native
        stack = find_stack(native)
        standing = list(stack.layers)
        state = (native, native.dtype, *standing)
        if self._parts is None or state != self._state:
            self._parts, self._prefix, self._state, self._standing = Partway(stack), None, state, standing
            self._entry = first_trainable(self._parts)
            self._below = [
                module
                for module in (*outside(self._parts), *standing[: self._entry])
                if not any(parameter.requires_grad for parameter in module.parameters())
            ]
        if native.training:
            for module in self._below:
                module.eval()
        wanted = self.cache_prefix and (native.training or self._entry not in (0, len(standing)))
        if wanted and self._prefix is None:
            self._prefix = FrozenPrefix(self._parts, *self._prefix_options, str(self.accelerator.mixed_precision))

    def _loss_is_chunked(self, inputs: Mapping[str, Any], return_outputs: bool) -> bool:
        """Whether the loss can be had without all logits, and is the only thing wanted."""
        native: Any = self._native
        assert self._parts is not None
        return (
            self.head_chunk != 0
            and "labels" in inputs
            and self.label_smoother is None
            and self.compute_loss_func is None
            and not (return_outputs and not self._only_loss)
            and native.loss_function is ForCausalLMLoss
            and not getattr(native.config, "output_router_logits", False)
            and "logits_to_keep" in inspect.signature(native.forward).parameters
            and not any(parameter.requires_grad for m in outside(self._parts) for parameter in m.parameters())
        )

    def _run_for_loss(
        self,
        model: nn.Module,
        base: torch.Tensor | None,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, torch.Tensor]:
        """What `Trainer` takes for the model's outputs.

        Args:
            model: Wrapped as for training.
            base: What the base's last layer returned, `(batch, seq, hidden)`.
            labels: `(batch, seq)`.
            num_items_in_batch: Tokens by which the sum is divided; `None`: those of this batch.
            shift_labels: `labels`, each where it is predicted.
            **inputs: The rest of the batch.
        """
        assert self._parts is not None
        with self._parts.capturing_last() as last:
            model(**inputs, logits_to_keep=_LAST_TOKEN, use_cache=False)
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        total, count = summed_loss(
            last[0], shift_labels.to(last[0].device), self._parts.head, self._chunk, base, self.kl_weight
        )
        return {"loss": total / (count if num_items_in_batch is None else num_items_in_batch)}

    @property
    def _chunk(self) -> int:
        config = self._native.config
        context = getattr(config, "max_position_embeddings", None) or _LOGITS_AT_ONCE
        return min(self.head_chunk or max(1, _LOGITS_AT_ONCE // config.vocab_size), context)

    @torch.no_grad()
    def _base_states(self, inputs: Mapping[str, Any], hidden: torch.Tensor | None) -> torch.Tensor:
        """What the last layer of the base returns for a batch, `(batch, seq, hidden)`.

        Args:
            inputs: The batch.
            hidden: Hidden states at the organ's entry, if they are known.
        """
        native: Any = self._native
        assert self._parts is not None
        with native.disable_donors(), contextlib.ExitStack() as stack:
            base = list(self._parts.stack.layers)
            if hidden is not None and base[: self._entry] == self._standing[: self._entry]:
                stack.enter_context(self._parts.running_from(self._entry, hidden))
            last = stack.enter_context(self._parts.capturing_last())
            native(**inputs, logits_to_keep=_LAST_TOKEN, use_cache=False)
        return last[0]

    def _organs(self) -> dict[str, DonorConfig]:
        """Configs of the organs that are trained, by name."""
        if not isinstance(self._native, Recipient):
            return {}
        learning = {each.name for each in self._native.get_donor_status().values() if each.num_trainable_parameters}
        return {name: config for name, config in self._native.donor_config.items() if name in learning}


def is_in_parts(module: nn.Module) -> bool:
    """Whether a module's parameters lie in parts on several processes (FSDP2, ZeRO-3), or are offloaded."""
    return is_partitioned(module) or any(isinstance(p, DTensor) or p.is_meta for p in module.parameters())


def last_whole_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a `Trainer` that was not cut short while it was written; `None` when there is none.

    `trainer_state.json` is what `Trainer` writes last.
    """

    def is_whole(checkpoint: Path) -> bool:
        try:
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        except (OSError, json.JSONDecodeError):
            return False
        return True

    found = [each for each in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if each.name.split("-")[-1].isdigit()]
    found.sort(key=lambda each: int(each.name.split("-")[-1]), reverse=True)
    return next((str(each) for each in found if is_whole(each)), None)
