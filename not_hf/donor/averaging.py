"""Combine donors of one span into a new one: means of their weights, or sums of what training changed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from not_hf.architecture.differences import computing_differences
from not_hf.architecture.layers import is_finite
from not_hf.cards.common import unite
from not_hf.cards.license import joint_license, organ_license
from not_hf.config import DonorConfig
from not_hf.donor.combining import MEANS, OF_VECTORS, SIGN_METHODS, SPARSE
from not_hf.donor.modeling import DonorModel
from not_hf.errors import IncompatibleDonorError, NotHFError, interval, one_line, some

Tensors = Mapping[str, torch.Tensor]
BaseLike = str | os.PathLike[str] | PreTrainedModel


@dataclass(frozen=True)
class Combination:
    """How tensors are combined; arguments and errors are as in `average_donors`."""

    combination_type: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        kind, density = self.combination_type, self.density
        if kind not in MEANS | OF_VECTORS:
            raise NotHFError(f"combination_type must be one of {(*MEANS, *OF_VECTORS)}, got {kind!r}")
        if kind not in SPARSE and density is not None:
            raise NotHFError(f"{kind} keeps every value; leave out density={density!r}, or choose from {(*SPARSE,)}")
        if kind in SPARSE and not (isinstance(density, int | float) and 0 < density <= 1):
            raise NotHFError(
                f"{kind} needs density, the share of values that is kept, above 0 and at most 1, got {density!r}; "
                "try density=0.5"
            )
        if self.majority_sign_method not in SIGN_METHODS:
            raise NotHFError(f"majority_sign_method must be one of {SIGN_METHODS}, got {self.majority_sign_method!r}")

    @property
    def needs_base(self) -> bool:
        """Whether it works on what training changed in the base's layers."""
        return self.combination_type in OF_VECTORS

    def weights_of(self, count: int, weights: Sequence[float] | None) -> list[float]:
        """Check the weights of that many organs; `None`: 1 each."""
        kind, given = self.combination_type, [1.0] * count if weights is None else [float(each) for each in weights]
        if count < 2 or len(given) != count or (kind == "slerp" and count != 2):
            wanted = "two" if kind == "slerp" else "two or more"
            raise NotHFError(
                f"{kind} needs {wanted} donors with a weight each, got {count} donors and {len(given)} weights"
            )
        if not all(-torch.inf < weight < torch.inf for weight in given):
            raise NotHFError(f"weights must be finite, got {given}")
        if not self.needs_base and abs(sum(given)) < 1e-6:
            raise NotHFError(f"weights must not sum to 0, got {given}")
        return given

    def __call__(
        self, tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor | None
    ) -> torch.Tensor:
        """Combine tensors of one shape, of which `base` is that of the base's layers if it is needed."""
        if base is None:
            return MEANS[self.combination_type](tensors, weights)
        options: dict[str, Any] = {"density": self.density} if self.combination_type in SPARSE else {}
        if "ties" in self.combination_type:
            options["majority_sign_method"] = self.majority_sign_method
        return base + OF_VECTORS[self.combination_type]([each - base for each in tensors], weights, **options)


def average_donors(
    donors: Sequence[str | os.PathLike[str] | DonorModel],
    weights: Sequence[float] | None = None,
    combination_type: str = "linear",
    density: float | None = None,
    majority_sign_method: str = "total",
    base: BaseLike | None = None,
) -> DonorModel:
    """Combine donors of one span and architecture into a new donor.

    Args:
        donors: Two or more donor models, folders or Hub IDs.
        weights: One number per donor. For `"linear"` and `"slerp"` they are relative to their sum; for the others,
            which combine the donors' differences from the base, they are factors as in PEFT. Default: 1 each.
        combination_type: `"linear"`, the mean of the weights; `"slerp"`, for two donors, along the arc between them.
            `"task_arithmetic"` adds the sum of the differences to the base; `"magnitude_prune"` keeps only their
            largest values, `"dare_linear"` random ones, rescaled. `"ties"` and `"dare_ties"` do so and average the
            values that have the majority's sign. `torch.manual_seed` determines what is random.
        density: Share of the values that is kept, for those that keep some.
        majority_sign_method: For `"ties"` and `"dare_ties"`: `"total"`, the sign of the sum, or `"frequency"`.
        base: Folder, Hub ID or live model that the donors were cut from, for their differences. `None`: the one that
            they name, of which only these layers are read.

    Returns:
        A donor with the place and dtype of the first one, and the licences of all. Its scale is 1, since weights are
        combined at scale 1, whatever scales the donors' configs have.

    Raises:
        IncompatibleDonorError: The donors have different spans, layers or labels, or the base has other layers.
        NotHFError: An argument is out of range, a value overflows in the dtype, or the donors do not name one base.
        OSError: A donor or the base cannot be read.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, average_donors
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> donors = [DonorModel.from_base(base, layers=(1, 3), domain=domain) for domain in ("Bible", "law")]
        >>> average_donors(donors, weights=[0.7, 0.3]).config.domain
        'Bible + law'
        >>> ties = average_donors(donors, combination_type="ties", density=0.5, base=base)
    """
    if isinstance(donors, str | os.PathLike | DonorModel):
        raise NotHFError(f"average_donors needs a list of two or more donors, got {donors!r:.100}; give it: [a, b]")
    combination = Combination(combination_type, density, majority_sign_method)
    weights = combination.weights_of(len(donors), weights)
    models = [each if isinstance(each, DonorModel) else DonorModel.from_pretrained(each) for each in donors]
    config = combined_config([model.config for model in models])
    layers = None
    if combination.needs_base:
        if models[0].config.modules_to_save or models[0].config.trainable_token_indices:
            raise NotHFError(
                f"{combination_type} combines layers, and these donors hold modules beside them; "
                'use combination_type="linear"'
            )
        layers = base_layers([model.config for model in models], combination_type, base).state_dict()
    tensors = combined([model.state_dict() for model in models], weights, combination, layers)
    average = copy.deepcopy(models[0])
    average.load_state_dict(tensors)
    average.config = config
    return average


@torch.no_grad()
def combined(
    states: Sequence[Tensors], weights: Sequence[float], combination: Combination, base: Tensors | None = None
) -> dict[str, torch.Tensor]:
    """Combine tensors by name, in float32.

    Args:
        states: Tensors of each organ.
        weights: One per organ, checked.
        combination: How.
        base: Tensors of the base's layers, if the combination needs them.

    Raises:
        IncompatibleDonorError: They have other names or shapes.
        NotHFError: A value overflows in the dtype of the first organ.
    """
    named = {f"donor {n}": state for n, state in enumerate(states, 1)} | ({} if base is None else {"the base": base})
    first = {name: tensor.shape for name, tensor in states[0].items()}
    for owner, state in named.items():
        if unmatched := {name for name, _ in first.items() ^ {name: t.shape for name, t in state.items()}.items()}:
            raise IncompatibleDonorError(f"{owner} has other tensors than donor 1: {some(sorted(unmatched))}")

    def one(name: str, like: torch.Tensor) -> torch.Tensor:
        ours = [state[name].to(like.device, torch.float32) for state in named.values()]
        theirs = None if base is None else ours.pop()
        made = combination(ours, weights, theirs).to(like.dtype)
        if not is_finite(made):
            raise NotHFError(
                f"the combination has non-finite values in {name} as {like.dtype}; choose smaller weights"
            )
        return made

    return {name: one(name, tensor) for name, tensor in states[0].items()}


def base_layers(configs: Sequence[DonorConfig], combination_type: str, base: BaseLike | None = None) -> DonorModel:
    """Cut the layers that organs of one span were cut from; only their bytes are read.

    Args:
        configs: Of the organs.
        combination_type: What they are for, for errors.
        base: The base; `None`: the one that the configs name.

    Raises:
        NotHFError: The configs do not name one base.
        OSError: The base cannot be read.
    """
    what = f"{combination_type} needs layers {interval(configs[0].span)} of the base that the donors were cut from"
    where: dict[str, Any] = {}
    if base is None:
        found = {(each.base_model_name_or_path, each.base_subfolder, each.base_revision) for each in configs}
        ((base, subfolder, revision), *others) = found
        if base is None or others:
            names = sorted(" ".join(filter(None, each)) or "none" for each in found)
            raise NotHFError(f"{what}, and they name {', '.join(names)}; give it: base=...")
        where = {"revision": revision, "subfolder": subfolder or ""}
    try:
        return DonorModel.from_base(base, configs[0].span, mode="replace", modules=configs[0].modules, **where)
    except OSError as error:
        raise OSError(
            f"{what}, which cannot be read: {one_line(error)}; to use another copy, give it: base="
        ) from error


def combined_config(configs: Sequence[DonorConfig]) -> DonorConfig:
    """Make the config of a combination: the place of the first donor, and the training data and licences of all.

    Raises:
        IncompatibleDonorError: The donors have different spans, configs or labels.
    """
    config = copy.deepcopy(configs[0])
    for other in configs[1:]:
        if other.span != config.span:
            raise IncompatibleDonorError(
                f"layers {interval(config.span)} and {interval(other.span)} cannot be averaged; "
                "choose donors of one span"
            )
        for key in ("modules", "modules_to_save", "trainable_token_indices", "labels"):
            if (ours := getattr(config, key)) != (theirs := getattr(other, key)):
                raise IncompatibleDonorError(f"donors with {key} {ours!r} and {theirs!r} cannot be averaged")
        if differences := computing_differences(config.native_config(), other.native_config()):
            raise IncompatibleDonorError(f"layers with different configs cannot be averaged: {some(differences)}")
    config.scale, config.metrics, config.best_position, config.init = 1.0, None, None, "copy"
    joint_license(organ_license(each, revision=each.base_revision) for each in configs).set(config)
    config.domain = " + ".join(unite([each.domain for each in configs if each.domain])) or None
    config.datasets = unite(*(each.datasets for each in configs)) or None
    counts = [each.tokens_seen for each in configs]
    config.tokens_seen = None if None in counts else sum(counts)  # type: ignore[arg-type]
    return config
