"""`DonorSFTTrainer` and `DonorDPOTrainer`: TRL's trainers, which compute once what stays the same below the organ."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from not_hf.errors import NotHFError, UnsupportedArchitectureError
from not_hf.recipient.mixin import Recipient
from not_hf.recipient.reference import reference_model
from not_hf.training.isolation import require_isolation
from not_hf.training.trained_stack import TrainedStack
from not_hf.training.trainer_mixin import DonorTrainerMixin


class _NeedsTRL(Trainer):
    """Stands in for TRL's trainers where it is not installed, so that `from not_hf import *` works there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"{type(self).__name__} needs TRL; pip install trl")


try:
    from trl import DPOTrainer, SFTTrainer
except ImportError:
    DPOTrainer = SFTTrainer = _NeedsTRL  # type: ignore[misc, assignment]


class DonorSFTTrainer(DonorTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` for organs, which starts at the organ where hidden states are cached.

    Arguments, data, metrics and the loss are those of `SFTTrainer`, whose head needs no logits of all tokens either.
    Frozen modules below the organ stay in eval mode, so their dropout is off.

    With `packing=True`, the documents of a batch are stored one by one, and found again beside whatever others. That
    needs a model that keeps them apart, which is tested; rounding may depend on where in its row a document stands.

    Args:
        *trainer_args: Passed to `SFTTrainer`.
        **trainer_kwargs: `cache_prefix`, `prefix_dir`, `max_prefix_bytes`, `prefix_dtype` and `optimizer` as in
            `DonorTrainer`; all others are passed to `SFTTrainer`.

    Raises:
        NotHFError: An option does not work with this model. `train` and `evaluate` raise it too, for what only shows
            there.
        UnsupportedArchitectureError: The layers of the model cannot be found, or it does not keep packed documents
            apart.

    Examples:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from trl import SFTConfig
        >>> from not_hf import DonorModel, DonorSFTTrainer, TransplantedForCausalLM
        >>> words = ["</s>", "in", "the", "beginning", "was", "word"]
        >>> tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        >>> shape = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4))
        >>> donor = DonorModel.from_base(base, layers=(2, 4), mode="replace")
        >>> model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="words", is_trainable=True)
        >>> folder = tempfile.mkdtemp()
        >>> trainer = DonorSFTTrainer(
        ...     model,
        ...     SFTConfig(folder, num_train_epochs=2, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True),
        ...     train_dataset=Dataset.from_dict({"text": ["in the beginning", "was the word"]}),
        ...     processing_class=tokenizer,
        ...     cache_prefix=True,
        ...     prefix_dir=f"{folder}/prefixes",
        ... )
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        2
    """

    def __init__(self, *trainer_args: Any, **trainer_kwargs: Any) -> None:
        super().__init__(*trainer_args, **trainer_kwargs)
        if self.cache_prefix and self.padding_free:
            self._prefix_options["by_document"] = True
            try:
                require_isolation(self._native, _flattening(self.data_collator))
            except NotHFError as error:
                raise UnsupportedArchitectureError(
                    f"packed documents are cached one by one, but {type(self._native).__name__} does not keep them "
                    "apart; use packing=False, packing_strategy='wrapped' or cache_prefix=False"
                ) from error


class DonorDPOTrainer(DonorTrainerMixin, DPOTrainer):
    """TRL's `DPOTrainer` for organs, which starts at the organ where hidden states are cached.

    Arguments, data, metrics and the loss are those of `DPOTrainer`. Chosen and rejected completions are rows of the
    cache, and the reference starts from them too. Frozen modules below the organ stay in eval mode.

    Args:
        model: As in `DPOTrainer`.
        ref_model: The reference; `None`: `reference_model(model)`, the model without its organs, on the same weights.
            With PEFT (`peft_config`, or a model that it has wrapped) and for a model by name, as in `DPOTrainer`.
        args: As in `DPOTrainer`; `sync_ref_model=True` needs a reference with weights of its own.
        *trainer_args: Passed to `DPOTrainer`.
        **trainer_kwargs: `cache_prefix`, `prefix_dir`, `max_prefix_bytes`, `prefix_dtype` and `optimizer` as in
            `DonorTrainer`; all others are passed to `DPOTrainer`.

    Raises:
        NotHFError: An option does not work with this model. `train` and `evaluate` raise it too, for what only shows
            there.
        UnsupportedArchitectureError: The layers of the model cannot be found.

    Examples:
        >>> import tempfile
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from trl import DPOConfig
        >>> from not_hf import DonorDPOTrainer, DonorModel, TransplantedForCausalLM
        >>> words = ["</s>", "in", "the", "beginning", "was", "word"]
        >>> tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        >>> shape = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4))
        >>> donor = DonorModel.from_base(base, layers=(2, 4), mode="replace")
        >>> model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="words", is_trainable=True)
        >>> pairs = {"prompt": ["in the"] * 2, "chosen": [" beginning"] * 2, "rejected": [" word"] * 2}
        >>> folder = tempfile.mkdtemp()
        >>> trainer = DonorDPOTrainer(
        ...     model,
        ...     args=DPOConfig(folder, num_train_epochs=2, use_cpu=True, bf16=False, save_strategy="no"),
        ...     train_dataset=Dataset.from_dict(pairs),
        ...     processing_class=tokenizer,
        ...     cache_prefix=True,
        ...     prefix_dir=f"{folder}/prefixes",
        ... )
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        2
    """

    _beside_inputs = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "skip_logits")

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: Any = None,
        *trainer_args: Any,
        **trainer_kwargs: Any,
    ) -> None:
        if ref_model is None and isinstance(model, Recipient) and trainer_kwargs.get("peft_config") is None:
            ref_model = reference_model(model)
        if getattr(args, "sync_ref_model", False) and hasattr(ref_model, "_carrier"):
            raise NotHFError(
                "sync_ref_model moves the reference's weights towards the model's, but reference_model shares the "
                "model's own; give ref_model=copy.deepcopy(model), or use sync_ref_model=False"
            )
        super().__init__(model, ref_model, args, *trainer_args, **trainer_kwargs)

    def _loss_from(
        self,
        hidden: torch.Tensor | None,
        stack: TrainedStack,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Any:
        """Compute the loss of `DPOTrainer`, with the reference from the same hidden states."""
        if hidden is None or self.precompute_ref_logps:
            return super()._loss_from(hidden, stack, model, inputs, return_outputs, num_items_in_batch)
        chosen, rejected = self._reference_log_probs(hidden, stack, inputs)
        batch = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.precompute_ref_logps = True  # of this batch
        try:
            return super()._loss_from(hidden, stack, model, batch, return_outputs, num_items_in_batch)
        finally:
            self.precompute_ref_logps = False

    def _reference_log_probs(
        self, hidden: torch.Tensor, stack: TrainedStack, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute log-probabilities of chosen and rejected completions under the reference, `(batch / 2,)` each."""
        if self.ref_model is not None and vars(self.ref_model).get("_carrier") is self._native:
            with self._without_donors(stack, hidden):
                return self.compute_ref_log_probs(self._native, inputs)
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)


def _flattening(collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """Return TRL's collator for blocks that say where their documents begin by `position_ids`."""

    def collate(blocks: list[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for block in blocks:
            starts = [n for n, position in enumerate(block["position_ids"]) if position == 0]
            lengths = [stop - start for start, stop in pairwise([*starts, len(block["position_ids"])])]
            rows.append({"input_ids": block["input_ids"], "labels": block["labels"], "seq_lengths": lengths})
        return {**collator(rows), "use_cache": False}

    return collate
