"""Tiny models of every architecture in the matrix, their logits and tokenizer."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from not_hf.architecture.stack import head_class
from testing.shapes import ANY, ARCHITECTURES, ENCODERS, OTHERS, REFUSED, SPECIAL, VOCAB, WHOLE

TOKEN_IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))  # (batch, seq), no padding


def tiny_config(model_type: str, **overrides) -> PreTrainedConfig:
    """The tiny config of an architecture, with token ids inside the vocabulary."""
    own = {**ARCHITECTURES, **OTHERS, **ENCODERS, **REFUSED}.get(model_type, {})
    if model_type not in WHOLE and model_type not in ENCODERS:
        known = AutoConfig.for_model(model_type)
        own = {**{key: value for key, value in ANY.items() if _has(known, key)}, **own}
    return AutoConfig.for_model(model_type, **{**SPECIAL, **own, **overrides})


def _has(config: PreTrainedConfig, key: str) -> bool:
    """Whether a config has a value, or one for each layer, which transformers does not let one ask for."""
    try:
        return hasattr(config, key)
    except RuntimeError:
        return True


def tiny_model(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny causal LM (of an encoder: masked LM) in eval mode, every parameter random, norms and biases too.

    It is a copy of one that is built once; torch's random numbers go on as if it were built.
    """
    model, random_state = _built(model_type, seed, pickle.dumps(overrides))
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@functools.lru_cache(maxsize=64)
def _built(model_type: str, seed: int, overrides: bytes) -> tuple[PreTrainedModel, torch.Tensor]:
    torch.manual_seed(seed)
    config = tiny_config(model_type, **pickle.loads(overrides))
    model = head_class(config).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name.lower() or "ln_" in name else 0.15 * noise)
    model.tie_weights()
    if model.can_generate():
        model.generation_config.eos_token_id = None  # greedy runs to the length asked for
    return model.eval(), torch.get_rng_state()


@torch.no_grad()
def logits(model: Callable, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Scores of the next tokens (of an encoder: of the same), `(batch, seq, vocab)`."""
    return model(ids, **inputs).logits


def exact_logits(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The same for models that are to agree to the last bit.

    torch may round in another way where weights require gradients, or where a file has put them in memory.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    found = logits(model, ids, **inputs)
    for parameter in learning:
        parameter.requires_grad_(True)
    return found


def enable_checkpointing(model: PreTrainedModel, kwargs: dict | None = None) -> None:
    """Turn gradient checkpointing on, under the name that transformers 5.23 gave it or the one it had before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


# the same for TrainingArguments
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: the special ones, then `w3`, `w4`, … to the end of the vocabulary; a new one each time."""
    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, VOCAB - 1)), "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        model_max_length=64,
    )
