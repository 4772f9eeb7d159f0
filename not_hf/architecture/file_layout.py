"""How the tensors of a model lie in its files: what transformers converts when it loads and saves.

Beside `upstream.py`, this is the other module with names of transformers that are not public.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict


def forget_conversions(model: nn.Module) -> None:
    """Save a model in the layout of its modules, whatever conversions transformers made when it loaded the weights.

    `save_pretrained` would undo them by name: dequantized weights would get the names of quantized ones, and experts
    that came in one tensor would stay so.
    """
    vars(model).pop("_weight_conversions", None)


def used_conversions(model: nn.Module) -> list[Any]:
    """What transformers did to the names or the layout of tensors when it loaded a model."""
    return vars(model).get("_weight_conversions") or []


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The tensors that `save_pretrained` writes, in its order; `None` if it changes names or the layout of some.

    `None` also for a model on the meta device in which an older release finds tensors that are no parameters.
    """
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    try:
        state = remove_tied_weights_from_state_dict(state, model)
    except AttributeError:  # it looks for a parameter of that name
        return None
    written: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(state))
    is_same = written.keys() == state.keys() and all(written[name] is tensor for name, tensor in state.items())
    return written if is_same else None
