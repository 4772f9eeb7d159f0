"""Muon for matrices and AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel, Trainer

from not_hf.errors import NotHFError


class MuonWithAdamW:
    """A factory of optimizers for `Trainer(optimizer_cls_and_kwargs=(MuonWithAdamW, {"lr": 3e-4, ...}))`.

    Muon (https://kellerjordan.github.io/posts/muon/) trains the matrices: trainable parameters of two dimensions to
    which Trainer applies weight decay, except embeddings and the head. Its updates are scaled to the size of AdamW's
    (arXiv 2502.16982, section 2.2), so that both share one learning rate and one weight decay. AdamW trains the rest:
    norms and biases, without weight decay, and experts that transformers stacks in one tensor of three dimensions,
    which torch's Muon does not support. A fused projection (query, key and value in one) counts as one matrix.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from not_hf import MuonWithAdamW
        >>> shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2))
        >>> optimizer = MuonWithAdamW()(model, lr=3e-4, weight_decay=0.1)
        >>> [(group["optimizer"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [('muon', 0.1, 14), ('adamw', 0.1, 2), ('adamw', 0.0, 5)]
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> JointOptimizer:
        """Make an optimizer for the trainable parameters of a model.

        Args:
            model: Any model. Organs that are loaded later are not included.
            lr: Learning rate of both; Trainer does not pass on its own.
            weight_decay: Decoupled weight decay of both; Trainer does not pass on its own.
            betas: Of AdamW.
            eps: Of AdamW.
            momentum: Of Muon.
            nesterov: Of Muon.
            ns_steps: Newton-Schulz iterations in each update of Muon.

        Raises:
            NotHFError: No parameter of the model is trainable.
        """
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # it does not use `self`
        outer = {id(parameter) for parameter in _outer_parameters(model)}
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        undecayed: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim == 2 and id(parameter) not in outer
            (undecayed if name not in decayed else matrices if is_matrix else others).append(parameter)
        if not (matrices or others or undecayed):
            raise NotHFError("no parameter of the model is trainable; load the organ with is_trainable=True")
        # groups may be empty: so there are always three, and a checkpoint of another optimizer is refused
        muon = Muon(
            [{"params": matrices}],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        groups: list[dict[str, Any]] = [{"params": others}, {"params": undecayed, "weight_decay": 0.0}]
        return JointOptimizer({"muon": muon, "adamw": AdamW(groups, lr, betas, eps, weight_decay)})


class JointOptimizer(Optimizer):
    """Several optimizers as one. A parameter group's `optimizer` names the one that updates it."""

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        """Join optimizers of different parameters.

        Args:
            parts: Optimizers by name; not to be used on their own afterwards.
        """
        self._parts = dict(parts)
        groups = [{**group, "optimizer": name} for name, part in parts.items() for group in part.param_groups]
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's `optimizer` names the optimizer that gets it and whose defaults apply.

        Raises:
            NotHFError: There is no optimizer of that name.
        """
        part = self._parts.get(param_group.get("optimizer", ""))
        if part is None:
            names = " or ".join(map(repr, self._parts))
            raise NotHFError(f"'optimizer' of a group must be {names}, got {param_group.get('optimizer')!r}")
        super().add_param_group({**part.defaults, **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step each optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # at each step, because resuming and sharding replace groups and state
            groups = [group for group in self.param_groups if group["optimizer"] == name]
            part.__setstate__({"param_groups": groups, "state": self.state})
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}


def _outer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of embeddings and the head: matrices that do not belong to a hidden layer."""
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        for each in (module if isinstance(module, nn.Embedding) else None, head):
            if each is not None:
                yield from each.parameters()
