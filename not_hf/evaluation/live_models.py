"""What two live models have in common."""

from __future__ import annotations

from torch import nn


def are_one_model(a: object, b: object) -> bool:
    """Whether two live models are one, so that what is put into the one is in the other as well.

    So are a model and its wrapper (PEFT, `torch.compile`), and two that share all their modules (`get_base_model()`).
    """
    return _is_part(a, b) or _is_part(b, a)


def _is_part(model: object, whole: object) -> bool:
    """Whether a live model, or all that it consists of, is inside of another one."""
    if not (isinstance(model, nn.Module) and isinstance(whole, nn.Module)):
        return False
    inside, children = set(whole.modules()), set(model.children())
    return model in inside or (bool(children) and children <= inside)
