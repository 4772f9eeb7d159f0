"""Modules beside the layers that belong to an organ: they stand in the place of the recipient's while it is active."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.computed_weights import ComputedWeights, store_weights
from not_hf.architecture.devices import follow
from not_hf.architecture.layers import require_finite, settle
from not_hf.architecture.outer_modules import find_outer_module, tied_modules, vocabulary_modules
from not_hf.architecture.stack import Stack
from not_hf.architecture.token_rows import TokenRows, hold_token_rows
from not_hf.architecture.upstream import is_partitioned, keys_left_in_place
from not_hf.config import DonorConfig
from not_hf.donor.saved_modules import ROWS, WHOLE, saved_name
from not_hf.errors import IncompatibleDonorError, NotHFError, some


@dataclass(frozen=True)
class SavedModules:
    """The modules of an organ that stand outside the stack.

    Args:
        modules: By path in the model, those included that share their weights.
        paths: Path in the model by the name in the donor's config.
        rows: Ids of tokens by name, where only these rows are the organ's.
        vocab_size: Number of tokens of the model while they stand in it; `None`: the recipient's.
    """

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    vocab_size: int | None = None

    def __bool__(self) -> bool:
        return bool(self.modules)

    @property
    def holds_rows_apart(self) -> bool:
        """Whether rows are parameters of their own, as in training."""
        return any(isinstance(module, TokenRows) for module in self.modules.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters; where rows are apart, these alone."""
        for module in self.modules.values():
            yield from [module.token_rows] if isinstance(module, TokenRows) else module.parameters()

    def state(self) -> dict[str, torch.Tensor]:
        """Return all tensors of the modules, by their paths in the model."""
        return {
            f"{path}.{key}": value for path, each in self.modules.items() for key, value in each.state_dict().items()
        }

    def set_trainable(self, is_trainable: bool) -> None:
        """Freeze the modules, or make them trainable; of rows, only these."""
        for module in self.modules.values():
            for parameter in module.parameters():
                parameter.requires_grad_(is_trainable and not isinstance(module, TokenRows))
            if isinstance(module, TokenRows):
                module.token_rows.requires_grad_(is_trainable)

    def tensors(self, state_dict: Mapping[str, torch.Tensor] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the organ's tensors by their names in a donor's checkpoint.

        Args:
            state_dict: The model's, gathered, if the organ is active.
        """
        for name, path in self.paths.items():
            module = self.modules[path]
            if state_dict is None and is_partitioned(module):
                raise NotHFError(
                    f"{path} is partitioned (DeepSpeed ZeRO-3); save with Trainer.save_model, or pass "
                    "state_dict=accelerator.get_state_dict(model)"
                )
            state = module.state_dict()
            if state_dict is not None:
                state = {key: state_dict.get(f"{path}.{key}", value) for key, value in state.items()}
            if name not in self.rows:
                yield from ((saved_name(WHOLE, name, key), value) for key, value in state.items())
            elif isinstance(module, TokenRows):
                yield saved_name(ROWS, name, "weight"), state["token_rows"]
            else:
                yield saved_name(ROWS, name, "weight"), state["weight"][list(self.rows[name])]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors, by their names in a donor's checkpoint, into the modules; those that are missing stay."""
        for name, path in self.paths.items():
            module = self.modules[path]
            if name not in self.rows:
                own = module.state_dict()
                for key, value in own.items():
                    value.copy_(tensors.get(saved_name(WHOLE, name, key), value))
            elif (value := tensors.get(saved_name(ROWS, name, "weight"))) is not None:
                if isinstance(module, TokenRows):
                    module.token_rows.copy_(value)
                else:
                    weight = module.get_parameter("weight")
                    weight[list(self.rows[name])] = value.to(weight)

    @torch.no_grad()
    def merged(self) -> SavedModules:
        """Return native modules with their values, rounded to the dtype that they compute in.

        Raises:
            CorruptDonorError: A value overflows in that dtype.
        """
        memo: dict[int, Any] = {}
        modules = {path: copy.deepcopy(module, memo) for path, module in self.modules.items()}
        for path, module in modules.items():
            values = module.computed(torch.empty(0, dtype=torch.long)) if isinstance(module, ComputedWeights) else {}
            for name, value in values.items():
                module.get_parameter(name).data = value
            store_weights(module)
            require_finite([module], path, {})
        return dataclasses.replace(self, modules=modules)


def standing_modules(base_modules: Mapping[str, nn.Module], saved: Mapping[str, SavedModules]) -> dict[str, nn.Module]:
    """Return the modules beside the layers that stand in a model with the modules of some organs, by path.

    Args:
        base_modules: Modules of the recipient in whose place those of organs may stand.
        saved: Those of the organs, by the organ's name.

    Raises:
        IncompatibleDonorError: Two of them hold the same module.
    """
    modules, owners = dict(base_modules), dict[str, str]()
    for name, each in saved.items():
        for path, module in each.modules.items():
            if path in owners:
                raise IncompatibleDonorError(
                    f"organs {owners[path]!r} and {name!r} both hold {path}; choose one with set_donor()"
                )
            modules[path], owners[path] = module, name
    return modules


def fit_saved_modules(
    model: PreTrainedModel,
    stack: Stack,
    base_modules: Mapping[str, nn.Module],
    config: DonorConfig,
    tensors: Mapping[str, torch.Tensor],
    is_trainable: bool,
    master_weights: bool,
) -> SavedModules:
    """Make copies of the recipient's modules that a donor's config names, with the donor's values.

    Args:
        model: The recipient; it is not changed.
        stack: Its stack.
        base_modules: Modules of the recipient in whose place those of organs may stand, by path.
        config: Config of the donor.
        tensors: The donor's, by their names in its checkpoint; what it has none of is as in the recipient. Of rows, it
            has the first that the config names.
        is_trainable: Whether rows are to be trained.
        master_weights: Hold what is trained in float32.

    Raises:
        NotHFError: The recipient has no such module, or it is partitioned or offloaded.
        IncompatibleDonorError: A module has another shape there, or ties what the donor holds apart.
    """
    rows = config.trainable_token_indices or {}
    modules: dict[str, nn.Module] = {}
    paths: dict[str, str] = {}
    memo: dict[int, Any] = {}
    for name in (*(config.modules_to_save or ()), *rows):
        group = tied_modules(stack, find_outer_module(stack, name))
        if taken := [path for path in group if path in modules]:
            raise IncompatibleDonorError(
                f"the recipient shares the weight of {taken[0]}, the donor does not; choose a recipient whose "
                "embeddings and head have weights of their own"
            )
        originals = [base_modules.get(path, model.get_submodule(path)) for path in group]
        _require_values(originals, name, tensors)
        indices = rows.get(name)
        if indices is not None and is_trainable and max(indices) < len(originals[0].get_parameter("weight")):
            weight = originals[0].get_parameter("weight")
            memo[id(weight)] = weight  # frozen, so it need not be copied
        copies = [copy.deepcopy(original, memo) for original in originals]
        for made, original in zip(copies, originals, strict=True):
            remove_hook_from_module(made, recurse=True)
            follow(made, original, keys_left_in_place(model))
        if indices is None:
            _fill(copies, name, tensors, can_grow=any(each in vocabulary_modules(model) for each in originals))
            for made, original in zip(copies, originals, strict=True):
                settle(made, original, None, master_weights)
        else:
            values = tensors.get(saved_name(ROWS, name, "weight"))
            num_tokens = config.native_config("base_config").vocab_size
            _put_rows(copies, name, indices, values, num_tokens, is_trainable, master_weights)
        require_finite(copies, name, {})
        paths[name] = group[0]
        modules |= dict(zip(group, copies, strict=True))
    return SavedModules(modules, paths, rows, _vocab_size(model, base_modules, modules))


def _require_values(modules: Sequence[nn.Module], name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that modules of the recipient can be copied."""
    if any(map(is_partitioned, modules)):
        raise NotHFError("the recipient is partitioned (DeepSpeed ZeRO-3); load organs before training begins")
    is_empty = any(parameter.is_meta for module in modules for parameter in module.parameters())
    if is_empty and not all(tensor.is_meta for tensor in tensors.values()):
        raise NotHFError(f"{name} of the recipient is offloaded or has no weights (meta device); load it first")


def _fill(modules: Sequence[nn.Module], name: str, tensors: Mapping[str, torch.Tensor], can_grow: bool) -> None:
    """Give the first of the modules, which share its weight, the donor's values, if the donor has any."""
    start = saved_name(WHOLE, name, "")
    given = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    own = modules[0].state_dict(keep_vars=True)
    if given and (unmatched := sorted(own.keys() ^ given.keys())):
        raise IncompatibleDonorError(f"{name} of the recipient has other tensors than the donor's: {some(unmatched)}")
    for key, value in given.items():
        if value.shape != own[key].shape and not (can_grow and value.shape[1:] == own[key].shape[1:]):
            sizes = f"{tuple(value.shape)} in the donor, {tuple(own[key].shape)} in the recipient"
            hint = f"; load the recipient with num_labels={len(value)}" if value.ndim and not can_grow else ""
            raise IncompatibleDonorError(f"{name}.{key} has shape {sizes}{hint}")
    for key, value in given.items():
        own[key].data = value.to(own[key].device, copy=True)
    _count_rows(modules)


def _put_rows(
    modules: Sequence[nn.Module],
    name: str,
    indices: Sequence[int],
    values: torch.Tensor | None,
    num_tokens: int,
    is_trainable: bool,
    master_weights: bool,
) -> None:
    """Put rows into the weight `(vocab, hidden)` that modules share, or beside it to be trained.

    The `values`, `(their number, hidden)`, are those of the first `indices`; the other rows stay the recipient's.
    """
    weight = modules[0].get_parameter("weight")
    if max(indices) >= len(weight):
        more = max(num_tokens, max(indices) + 1) - len(weight)
        weight.data = torch.cat([weight.data, weight.new_zeros(more, weight.shape[1])])
        _count_rows(modules)
    rows = weight.detach()[list(indices)]
    if values is not None:
        if values.shape[1:] != weight.shape[1:]:
            raise IncompatibleDonorError(
                f"rows of {name} have {values.shape[1]} values in the donor, {weight.shape[1]} in the recipient"
            )
        rows = torch.cat([values.to(weight.device), rows[len(values) :]])
    if not is_trainable:
        weight.data[list(indices)] = rows.to(weight)
        return
    dtype = torch.float32 if master_weights and weight.element_size() == 2 else weight.dtype
    hold_token_rows(modules, indices, nn.Parameter(rows.to(weight.device, dtype, copy=True)))


def _count_rows(modules: Sequence[nn.Module]) -> None:
    """Have embeddings and heads know how many rows their weight has."""
    for module in modules:
        for count in ("num_embeddings", "out_features"):
            if hasattr(module, count):
                setattr(module, count, len(module.get_parameter("weight")))


def _vocab_size(
    model: PreTrainedModel, base_modules: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> int | None:
    """Return the number of tokens that a model has with these modules; `None`: as many as without."""
    counts: list[tuple[int, int]] = []
    for standing in vocabulary_modules(model):
        path = next(path for path, module in model.named_modules() if module is standing)
        base = base_modules.get(path, standing)
        ours, theirs = (len(module.get_parameter("weight")) for module in (modules.get(path, base), base))
        counts.append((ours, theirs))
    if all(ours == theirs for ours, theirs in counts):
        return None
    if len({ours for ours, _ in counts}) > 1:
        raise IncompatibleDonorError(
            f"the donor brings rows for {counts[0][0]} tokens for the embeddings, {counts[1][0]} for the head; "
            "name both in modules_to_save or trainable_token_indices, or resize the recipient's first"
        )
    return counts[0][0]
