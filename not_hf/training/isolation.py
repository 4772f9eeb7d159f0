"""Whether the documents of one block stay apart in a model; found out by running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, default_data_collator

from not_hf.architecture.layers import eval_mode
from not_hf.architecture.upstream import attention_of
from not_hf.errors import NotHFError, UnsupportedArchitectureError

# Tokens of the two documents in each of two blocks: two, because flash attention tells documents apart in a batch of
# one block and no more; of different lengths, for a mask of the first block would fit an equal second one.
_LENGTHS = ((5, 11), (9, 7))


def require_isolation(model: PreTrainedModel, data_collator: Callable[[list], Any] = default_data_collator) -> None:
    """Make sure that a model, as it is now, keeps apart the documents of blocks of `pack(isolate_documents=True)`.

    Models of transformers do so where they make their masks from `position_ids`, and only when these come without
    `attention_mask` and without a cache. Where something is amiss they attend across documents and say nothing. So it
    is tried: a small batch goes through the collator and the model, and the outputs of its last document must not
    depend, by gradient and hence exactly in any dtype, on the embedding of any token outside of it.

    The model is given back as it was; no gradient reaches its parameters. One forward and one backward pass of 32
    tokens; on failure a few more, to say what to change.

    Args:
        model: The model about to be trained, after the `Trainer` was made with it: `config.use_cache`, which the
            Trainer turns off, matters.
        data_collator: What will make the batches: `trainer.data_collator`.

    Raises:
        UnsupportedArchitectureError: The model lets tokens see other documents, whatever the batch.
        NotHFError: It does so because of the collator or because of `config.use_cache`.
    """
    if not _leaks(model, data_collator):
        return
    uncached = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    if uncached and not _leaks(model, data_collator, **uncached):
        raise NotHFError(
            "documents are kept apart only without a cache; set model.config.use_cache = False, as the Trainer does"
        )
    if data_collator is not default_data_collator and not _leaks(model, default_data_collator, **uncached):
        name = getattr(data_collator, "__name__", type(data_collator).__name__)
        raise NotHFError(
            f"{name} drops what keeps documents apart (their position_ids, and no attention_mask); "
            "use data_collator=transformers.default_data_collator"
        )
    attention = attention_of(model.config)
    other = "" if attention in ("eager", "sdpa") else 'load it with attn_implementation="sdpa", or '
    raise UnsupportedArchitectureError(
        f"{type(model).__name__} ({attention} attention) does not keep documents apart by their position_ids; "
        f"{other}pack without isolate_documents"
    )


def _leaks(model: PreTrainedModel, data_collator: Callable[[list], Any], **options: Any) -> bool:
    """Whether what the model says of a batch's last document depends on any other."""
    random = torch.Generator().manual_seed(0)
    blocks = []
    for lengths in _LENGTHS:
        ids = torch.randint(model.config.get_text_config().vocab_size, (sum(lengths),), generator=random).tolist()
        positions = [position for length in lengths for position in range(length)]
        labels = [token if position else -100 for token, position in zip(ids, positions, strict=True)]
        blocks.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    batch = {name: tensor.to(model.device) for name, tensor in data_collator(blocks).items() if name != "labels"}
    input_ids = batch.pop("input_ids")
    if input_ids.numel() != sum(map(sum, _LENGTHS)):  # padded
        return True
    with eval_mode(model), torch.enable_grad():  # dropout would do no harm, but a router's noise may
        embeddings = model.get_input_embeddings()(input_ids).detach().requires_grad_()
        outputs = model(inputs_embeds=embeddings, **batch, **options)[0].flatten(0, 1)  # (tokens, vocab)
        document = outputs[-_LENGTHS[-1][-1] :].float()
        # in a random direction: after a norm, sums and squares are constant
        direction = torch.randn(document.shape, generator=random).to(document.device)
        (gradient,) = torch.autograd.grad((document * direction).sum(), embeddings)
    return bool(gradient.flatten(0, 1)[: -len(document)].any())
