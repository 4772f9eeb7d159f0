"""Block expansion: silent copies of layers spread over a stack, to be trained while the model's own stay frozen."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from not_hf.architecture.stack import layers_config
from not_hf.architecture.upstream import HUB_KWARGS, resolve_commit
from not_hf.composition.resolve import read_base_config
from not_hf.donor.modeling import DonorModel
from not_hf.errors import NotHFError
from not_hf.recipient.heads import class_for, class_of
from not_hf.recipient.modeling import Transplanted


def expand(
    base: str | os.PathLike[str] | PreTrainedModel,
    num_blocks: int,
    *,
    is_trainable: bool = False,
    autocast_donor_dtype: bool = True,
    **base_kwargs: Any,
) -> Transplanted:
    """Insert silent copies of layers, spread evenly over the stack of a model (LLaMA Pro, arXiv 2401.02415).

    The stack is divided into `num_blocks` groups of layers, and the last layer of each is copied behind itself, with
    output projections of zero. So the model computes what it did before, bit for bit, until the copies are trained.
    Each is an organ, `"block0"` … from front to back; `save_pretrained` makes a composition of them.

    Args:
        base: Folder, Hub ID or live model, which is expanded in place.
        num_blocks: Number of copies, at most one for each layer.
        is_trainable: Make the copies trainable. All other parameters are frozen.
        autocast_donor_dtype: As in `from_pretrained`, for all copies.
        **base_kwargs: For the model's `from_pretrained` (`dtype`, `device_map`, `revision`, …).

    Raises:
        NotHFError: `num_blocks` is out of range, or the model has organs.
        UnsupportedArchitectureError: A copy cannot be silent, or the model has no stack. As with any error, a live
            model is unchanged.
        OSError: The model cannot be read.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import expand
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> model = expand(base, num_blocks=2, is_trainable=True)
        >>> model.config.num_hidden_layers
        6
        >>> [(name, status.position) for name, status in model.get_donor_status().items()]
        [('block0', 2), ('block1', 4)]
    """
    hub_kwargs: dict[str, Any] = {}
    if isinstance(base, Transplanted):
        raise NotHFError("the live model has organs, if inactive ones; unload() or merge_and_unload() it, then expand")
    if isinstance(base, PreTrainedModel):
        native, kind = base.config, class_of(base)
    else:
        hub_kwargs = {key: base_kwargs[key] for key in HUB_KWARGS if key in base_kwargs}
        hub_kwargs["revision"] = base_kwargs["revision"] = resolve_commit(os.fspath(base), hub_kwargs)
        native, _ = read_base_config(os.fspath(base), None, dict(hub_kwargs))
        kind = class_for(native)
    num_layers = layers_config(native).num_hidden_layers
    if not isinstance(num_blocks, int) or not 1 <= num_blocks <= num_layers:
        raise NotHFError(f"num_blocks must be between 1 and {num_layers}, the model's layers, got {num_blocks!r}")
    ends = [num_layers * (n + 1) // num_blocks for n in range(num_blocks)]
    blocks = [DonorModel.from_base(base, (end - 1, end), init="identity", **hub_kwargs) for end in ends]
    training: dict[str, Any] = {"is_trainable": is_trainable, "autocast_donor_dtype": autocast_donor_dtype}
    model = kind.from_pretrained(base, blocks[0], donor_name="block0", **training, **base_kwargs)
    try:
        for n, block in enumerate(blocks[1:], 1):
            model.load_donor(block, f"block{n}", **training)
    except BaseException:
        model.unload()
        raise
    return model
