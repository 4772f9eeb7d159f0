"""Check by running a model that documents in one block do not attend to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, default_data_collator

from not_hf.architecture.devices import input_device
from not_hf.architecture.layers import eval_mode
from not_hf.architecture.upstream import attention_of
from not_hf.errors import NotHFError, UnsupportedArchitectureError

# Lengths of the documents in each block of the test batch. Two blocks, because flash attention separates documents
# only in a batch of one. Different lengths, because the mask of the first block would also fit an equal second one.
_LENGTHS = ((5, 11), (9, 7))


def require_isolation(model: PreTrainedModel, data_collator: Callable[[list], Any] = default_data_collator) -> None:
    """Check that a model isolates the documents in blocks of `pack(isolate_documents=True)`.

    Models of transformers do so if they derive their masks from `position_ids`, and only without `attention_mask` and
    without a cache. Otherwise they attend across documents silently. So it is tested: a small batch goes through the
    collator and the model, and the gradient of its last document's outputs with respect to the embeddings of all other
    tokens must be exactly zero, in any dtype.

    The test takes one forward and one backward pass of 32 tokens; on failure a few more, to find out what to change.
    The model is unchanged, and its parameters get no gradient.

    Args:
        model: The model to be trained. Make the `Trainer` first: it turns `config.use_cache` off, which matters here.
        data_collator: The one that will make the batches: `trainer.data_collator`.

    Raises:
        UnsupportedArchitectureError: The model does not isolate documents, whatever the batch.
        NotHFError: The collator or `config.use_cache` prevents it.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from not_hf import require_isolation
        >>> shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, use_cache=False))
        >>> require_isolation(model)
        >>> model.config.use_cache = True
        >>> require_isolation(model)
        Traceback (most recent call last):
        not_hf.errors.NotHFError: documents are isolated only without a cache; set model.config.use_cache = False
    """
    if not _leaks(model, data_collator):
        return
    uncached = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    if uncached and not _leaks(model, data_collator, **uncached):
        raise NotHFError("documents are isolated only without a cache; set model.config.use_cache = False")
    if data_collator is not default_data_collator and not _leaks(model, default_data_collator, **uncached):
        name = getattr(data_collator, "__name__", type(data_collator).__name__)
        raise NotHFError(
            f"{name} does not keep the position_ids of documents, or adds an attention_mask; "
            "use data_collator=transformers.default_data_collator"
        )
    attention = attention_of(model.config)
    other = "" if attention in ("eager", "sdpa") else 'load it with attn_implementation="sdpa", or '
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} ({attention} attention) does not isolate documents by their position_ids; "
        f"{other}pack without isolate_documents"
    )


def _leaks(model: PreTrainedModel, data_collator: Callable[[list], Any], **options: Any) -> bool:
    """Whether the outputs of a batch's last document depend on any other document."""
    random = torch.Generator().manual_seed(0)
    blocks = []
    for lengths in _LENGTHS:
        vocab_size = model.config.get_text_config().vocab_size
        ids = torch.randint(vocab_size, (sum(lengths),), generator=random, device="cpu").tolist()
        positions = [position for length in lengths for position in range(length)]
        labels = [token if position else -100 for token, position in zip(ids, positions, strict=True)]
        blocks.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    batch = {
        name: value.to(input_device(model)) if isinstance(value, torch.Tensor) else value
        for name, value in data_collator(blocks).items()
        if name != "labels"
    }
    input_ids = batch.pop("input_ids")
    if input_ids.numel() != sum(map(sum, _LENGTHS)):  # padded
        return True
    with eval_mode(model), torch.enable_grad():  # for routers with noise; dropout would not matter
        embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
        outputs = model(inputs_embeds=embeddings, **batch, **options)[0].flatten(0, 1)  # (tokens, vocab)
        document = outputs[-_LENGTHS[-1][-1] :].float()
        # random, because behind a norm sums and squares are constant
        direction = torch.randn(document.shape, generator=random, device="cpu").to(document.device)
        (gradient,) = torch.autograd.grad((document * direction).sum(), embeddings)
    return bool(gradient.flatten(0, 1)[: -len(document)].any())
