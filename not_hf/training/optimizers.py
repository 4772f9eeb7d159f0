"""Muon for the matrices of the layers and AdamW for the rest, as one optimizer for `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel, Trainer

from not_hf.errors import NotHFError


class MuonWithAdamW:
    """A factory, as `Trainer` takes it: `Trainer(..., optimizer_cls_and_kwargs=(MuonWithAdamW, {"lr": 3e-4, ...}))`.

    Muon (https://kellerjordan.github.io/posts/muon/) gets the matrices: trainable parameters of two dimensions that
    Trainer would decay, other than embeddings and the head. Its updates are scaled to the size of AdamW's
    (arXiv 2502.16982, section 2.2), so that one rate and one weight decay serve both. AdamW gets everything else:
    norms and biases, without weight decay, and the experts that transformers stacks in one tensor of three dimensions,
    which torch's Muon does not take. A fused projection (query, key and value in one) counts as one matrix.
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
        """Make the optimizer of a model's trainable parameters.

        Args:
            model: Any model; with organs, as they are loaded now.
            lr: Rate of both; Trainer hands on neither its `learning_rate` nor its `weight_decay`.
            weight_decay: Decoupled, of both.
            betas: AdamW's.
            eps: AdamW's.
            momentum: Muon's.
            nesterov: Muon's.
            ns_steps: Newton-Schulz iterations of each Muon update.

        Raises:
            NotHFError: Nothing in the model is trainable.
        """
        decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # it reads nothing of a trainer
        outer = {id(parameter) for parameter in _outer_parameters(model)}
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        bare: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim == 2 and id(parameter) not in outer
            (bare if name not in decayed else matrices if is_matrix else others).append(parameter)
        if not (matrices or others or bare):
            raise NotHFError("no parameter of the model is trainable; load the organ with is_trainable=True")
        # groups may be empty: a checkpoint of another optimizer, which has fewer, is then refused when it is loaded
        muon = Muon(
            [{"params": matrices}],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
        groups: list[dict[str, Any]] = [{"params": others}, {"params": bare, "weight_decay": 0.0}]
        return JointOptimizer({"muon": muon, "adamw": AdamW(groups, lr, betas, eps, weight_decay)})


class JointOptimizer(Optimizer):
    """Several optimizers that step as one. Each works on those of the groups whose `optimizer` is its name."""

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        """Join optimizers of different parameters.

        Args:
            parts: By name; from now on they are this optimizer's.
        """
        self._parts = dict(parts)
        groups = [{**group, "optimizer": name} for name, part in parts.items() for group in part.param_groups]
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; its `optimizer` says which of them gets the group, whose defaults fill in what it leaves out.

        Raises:
            NotHFError: It says none of them.
        """
        part = self._parts.get(param_group.get("optimizer", ""))
        if part is None:
            raise NotHFError(f"a group for no optimizer; give it 'optimizer': {' or '.join(map(repr, self._parts))}")
        super().add_param_group({**part.defaults, **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Let each make its step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, part in self._parts.items():
            # now, for resuming and sharding put other groups or another state in the place of those that there were
            groups = [group for group in self.param_groups if group["optimizer"] == name]
            part.__setstate__({"param_groups": groups, "state": self.state})
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parts": self._parts}


def _outer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of embeddings and of the head: matrices, but of no hidden layer."""
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
        for each in (module if isinstance(module, nn.Embedding) else None, head):
            if each is not None:
                yield from each.parameters()
