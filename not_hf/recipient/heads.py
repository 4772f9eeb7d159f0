"""The public classes of recipients, one for each head that transformers has an Auto class for.

They differ in the Auto class that loads the recipient; those that generate text guard `generate`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from not_hf.architecture.stack import head_class, saved_class
from not_hf.architecture.upstream import native_classes
from not_hf.config import DonorConfig
from not_hf.errors import NotHFError
from not_hf.recipient.modeling import Transplanted
from not_hf.recipient.prefill import Prefill, starting_from


class Generating(Transplanted):
    """Base class of those that generate text."""

    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, depth: int | None = None
    ) -> Prefill:
        """Read a prompt with the layers below all organs, once for all of them.

        `generate(..., prefill=...)` with the same inputs goes on from there, whichever organs are active then: tokens
        and, on a CPU in float32, logits are those of `generate` without it, bit for bit. Several beams or answers of a
        prompt share its reading, where `generate` alone reads it for each of them: there logits may differ in their
        last digits if a processor rounds differently in larger batches. What has changed below since then is noticed
        and refused, but for what is written through `tensor.data`. Options with which `generate` does not begin by
        reading the whole prompt as it is are refused, too: `assistant_model`, `prompt_lookup_num_tokens` and others
        that draft tokens, a `prefill_chunk_size` smaller than the prompt, and `token_healing`.

        Args:
            input_ids: Tokens of the prompt, `(batch, seq)`.
            attention_mask: 1 for tokens, 0 for padding, `(batch, seq)`.
            depth: Number of layers to run. Default: those below the lowest position of the loaded organs.

        Raises:
            NotHFError: `depth` is out of range.
            UnsupportedArchitectureError: The layers pass on more than hidden states, or have no cache of their own.
        """
        surgery = self._surgery
        positions = [organ.place.position for organ in surgery.organs.values()]
        lowest = min([*positions, surgery.base_config.num_hidden_layers])
        depth = lowest if depth is None else depth
        if not 0 <= depth <= lowest:
            raise NotHFError(f"depth must be between 0 and {lowest}, the lowest position of an organ, got {depth!r}")
        return Prefill.of(surgery.stack(self), depth, input_ids, attention_mask)

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, prefill: Prefill | None = None, **kwargs: Any) -> Any:  # noqa: D102 (wrapped)
        native: Any = super()
        with self._surgery.changes.watched():
            if prefill is None:
                return native.generate(*args, **kwargs)
            prefill.require_current(self._surgery.stack(self))
            prefill.require_same_reading(self, args, kwargs)
            return starting_from(self, prefill, functools.partial(native.generate, *args, **kwargs))


class TransplantedForCausalLM(Generating):
    """A causal LM with organs, made by `from_pretrained`: an instance of its native class (`LlamaForCausalLM`, …) too.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, TransplantedForCausalLM
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3))
        >>> model = TransplantedForCausalLM.from_pretrained(base, donor, donor_name="kjv")
        >>> model.active_donors, model.config.num_hidden_layers
        (['kjv'], 6)
        >>> with model.disable_donors():
        ...     model.config.num_hidden_layers
        4
        >>> native = model.merge_and_unload()
    """

    native_auto_class = AutoModelForCausalLM


class TransplantedForImageTextToText(Generating):
    """A vision-language model with organs among the layers of its text model, made by `from_pretrained`.

    An organ of the text model alone fits, and the other way round, where both have the same layers.

    Examples:
        >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
        >>> from not_hf import DonorModel, TransplantedForImageTextToText
        >>> shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> text = LlamaConfig(vocab_size=9, num_hidden_layers=4, **shape)
        >>> vision = CLIPVisionConfig(num_hidden_layers=2, image_size=4, patch_size=2, **shape)
        >>> config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=8)
        >>> base = LlavaForConditionalGeneration(config)
        >>> model = TransplantedForImageTextToText.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> model.config.text_config.num_hidden_layers
        6
    """

    native_auto_class = AutoModelForImageTextToText


class TransplantedForMultimodalLM(Generating):
    """A model for text, images, sounds or videos with organs; as `TransplantedForImageTextToText`.

    Examples:
        >>> from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration
        >>> from not_hf import DonorModel, TransplantedForMultimodalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
        >>> text = {"model_type": "qwen2", "vocab_size": 9, "num_hidden_layers": 4, **shape}
        >>> audio = {"d_model": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
        >>> config = Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=8)
        >>> base = Qwen2AudioForConditionalGeneration(config)
        >>> model = TransplantedForMultimodalLM.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> model.config.text_config.num_hidden_layers
        6
    """

    native_auto_class = AutoModelForMultimodalLM


class TransplantedForMaskedLM(Transplanted):
    """A masked LM with organs, made by `from_pretrained`: an instance of its native class (`BertForMaskedLM`, …) too.

    Examples:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from not_hf import DonorModel, TransplantedForMaskedLM
        >>> shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> base = BertForMaskedLM(BertConfig(**shape, num_hidden_layers=4))
        >>> model = TransplantedForMaskedLM.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> model.config.num_hidden_layers
        6
    """

    native_auto_class = AutoModelForMaskedLM


class TransplantedForSequenceClassification(Transplanted):
    """A sequence classifier with organs, made by `from_pretrained`; its head is the recipient's own.

    An organ that was cut from a causal LM, or trained in one, fits a classifier of the same architecture. A head that
    is to be trained too, and saved with the organ, is named in `modules_to_save`.

    Examples:
        >>> from transformers import GPT2Config, GPT2ForSequenceClassification
        >>> from not_hf import DonorModel, TransplantedForSequenceClassification
        >>> config = GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2, num_labels=3)
        >>> base = GPT2ForSequenceClassification(config)
        >>> donor = DonorModel.from_base(base, layers=(1, 3))
        >>> model = TransplantedForSequenceClassification.from_pretrained(base, donor)
        >>> type(model.merge_and_unload()).__name__
        'GPT2ForSequenceClassification'
    """

    native_auto_class = AutoModelForSequenceClassification


class TransplantedForTokenClassification(Transplanted):
    """A token classifier with organs, made by `from_pretrained`; as `TransplantedForSequenceClassification`.

    Examples:
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> from not_hf import DonorModel, TransplantedForTokenClassification
        >>> shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> base = BertForTokenClassification(BertConfig(**shape, num_hidden_layers=4))
        >>> model = TransplantedForTokenClassification.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> model.config.num_hidden_layers
        6
    """

    native_auto_class = AutoModelForTokenClassification


class TransplantedForQuestionAnswering(Transplanted):
    """A model for extractive question answering with organs; as `TransplantedForSequenceClassification`.

    Examples:
        >>> from transformers import BertConfig, BertForQuestionAnswering
        >>> from not_hf import DonorModel, TransplantedForQuestionAnswering
        >>> shape = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> base = BertForQuestionAnswering(BertConfig(**shape, num_hidden_layers=4))
        >>> model = TransplantedForQuestionAnswering.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> model.config.num_hidden_layers
        6
    """

    native_auto_class = AutoModelForQuestionAnswering


class TransplantedModel(Transplanted):
    """A model without a head, for embeddings, with organs; made by `from_pretrained`.

    `AutoModel.from_pretrained(donor_id)` loads the organ alone, as a `DonorModel`; this class loads its base too.

    Examples:
        >>> from transformers import GPT2Config, GPT2Model
        >>> from not_hf import DonorModel, TransplantedModel
        >>> base = GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> model = TransplantedModel.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> type(model.merge_and_unload()).__name__
        'GPT2Model'
    """

    native_auto_class = AutoModel


# AutoModel is not among those that load them by ID: it loads a `DonorModel`.
BY_ID = (
    TransplantedForCausalLM,
    TransplantedForImageTextToText,
    TransplantedForMaskedLM,
    TransplantedForMultimodalLM,
    TransplantedForQuestionAnswering,
    TransplantedForSequenceClassification,
    TransplantedForTokenClassification,
)


def class_of(model: PreTrainedModel) -> type[Transplanted]:
    """The class for a live recipient."""
    for kind in (*BY_ID, TransplantedModel):
        if isinstance(model, native_classes(kind.native_auto_class, model.config)):
            return kind
    return class_for(model.config)


def class_for(config: PreTrainedConfig) -> type[Transplanted]:
    """The class for recipients with the head that a config names, or else for language models of that config."""
    usual, saved = head_class(config), saved_class(config)
    others = [kind for kind in BY_ID if kind not in (TransplantedForCausalLM, TransplantedForMaskedLM)]
    if saved is not None and saved not in native_classes(usual, config):
        for kind in others:
            if saved in native_classes(kind.native_auto_class, config):
                return kind
    return next(kind for kind in (*BY_ID, TransplantedModel) if kind.native_auto_class is usual)


def recipient_config(source: PreTrainedModel | str | os.PathLike[str], **where: Any) -> Any:
    """Return the config of a recipient, live or by name (`where`: its revision …), or of the base of a donor."""
    if isinstance(source, torch.nn.Module):
        return source.config
    config = AutoConfig.from_pretrained(os.fspath(source), trust_remote_code=False, **where)
    if isinstance(config, DonorConfig) and config.base_model_name_or_path:
        where = {"revision": config.base_revision, "subfolder": config.base_subfolder or ""}
        config = AutoConfig.from_pretrained(config.base_model_name_or_path, trust_remote_code=False, **where)
    return config


def writing_class(source: str) -> type[Transplanted]:
    """The class for recipients that write text, and may take more than text, by the name of a recipient or a donor.

    `TransplantedForCausalLM` where no config can be read: the class then says why.
    """
    kinds = (TransplantedForCausalLM, TransplantedForImageTextToText, TransplantedForMultimodalLM)
    try:
        config = recipient_config(source)
    except (OSError, ValueError):
        return TransplantedForCausalLM
    return next((kind for kind in kinds if native_classes(kind.native_auto_class, config)), TransplantedForCausalLM)
