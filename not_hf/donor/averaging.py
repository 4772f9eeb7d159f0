"""Average donors of one span into a new one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence

import torch

from not_hf.architecture.differences import computing_differences
from not_hf.cards.common import unite
from not_hf.config import DonorConfig
from not_hf.donor.modeling import DonorModel
from not_hf.errors import IncompatibleDonorError, NotHFError, interval, some

Tensors = Mapping[str, torch.Tensor]


def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Compute the weighted mean of tensors of one shape, `sum(w_i t_i) / sum(w_i)`."""
    return sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True)) / sum(weights)  # type: ignore


def slerp(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Average two tensors of one shape along the arc between them, which preserves their length.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985, on flattened tensors, at `w_2 / (w_1 + w_2)`.
    """
    a, b = tensors
    t = weights[1] / sum(weights)
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if not (a.any() and b.any() and torch.sin(angle) > 1e-4):  # zero or parallel: there is no arc
        return linear(tensors, weights)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


COMBINATIONS: dict[str, Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]] = {
    "linear": linear,
    "slerp": slerp,
}


def average_donors(
    donors: Sequence[str | os.PathLike[str] | DonorModel],
    weights: Sequence[float] | None = None,
    combination_type: str = "linear",
) -> DonorModel:
    """Average donors of one span and architecture into a new donor.

    Args:
        donors: Two or more donor models, folders or Hub IDs.
        weights: One number per donor, relative to their sum; default: equal weights.
        combination_type: `"linear"`, or `"slerp"` for two donors.

    Returns:
        A donor with the place and dtype of the first one.

    Raises:
        IncompatibleDonorError: The donors have different spans or layers.
        NotHFError: An argument is out of range.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, average_donors
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> donors = [DonorModel.from_base(base, layers=(1, 3), domain=domain) for domain in ("Bible", "law")]
        >>> average_donors(donors, weights=[0.7, 0.3]).config.domain
        'Bible + law'
    """
    if isinstance(donors, str | os.PathLike | DonorModel):
        raise NotHFError(f"average_donors needs a list of two or more donors, got {donors!r:.100}; give it: [a, b]")
    models = [each if isinstance(each, DonorModel) else DonorModel.from_pretrained(each) for each in donors]
    tensors = combined([model.state_dict() for model in models], weights, combination_type)
    config = combined_config([model.config for model in models])
    average = copy.deepcopy(models[0])
    average.load_state_dict(tensors)
    average.config = config
    return average


@torch.no_grad()
def combined(
    states: Sequence[Tensors], weights: Sequence[float] | None, combination_type: str
) -> dict[str, torch.Tensor]:
    """Average tensors by name, in float32. Arguments and errors as in `average_donors`."""
    weights = [1.0] * len(states) if weights is None else [float(weight) for weight in weights]
    if combination_type not in COMBINATIONS:
        raise NotHFError(f"combination_type must be one of {tuple(COMBINATIONS)}, got {combination_type!r}")
    if len(states) < 2 or len(weights) != len(states) or (combination_type == "slerp" and len(states) != 2):
        wanted = "two" if combination_type == "slerp" else "two or more"
        raise NotHFError(
            f"{combination_type} needs {wanted} donors with a weight each, "
            f"got {len(states)} donors and {len(weights)} weights"
        )
    if not all(-torch.inf < weight < torch.inf for weight in weights) or abs(sum(weights)) < 1e-6:
        raise NotHFError(f"weights must be finite and must not sum to 0, got {weights}")
    first, *others = ({name: tensor.shape for name, tensor in state.items()} for state in states)
    for n, other in enumerate(others, 2):
        if unmatched := {name for name, _ in first.items() ^ other.items()}:
            raise IncompatibleDonorError(f"donor {n} has other tensors than donor 1: {some(sorted(unmatched))}")
    combine = COMBINATIONS[combination_type]
    return {
        name: combine([state[name].to(tensor.device, torch.float32) for state in states], weights).to(tensor.dtype)
        for name, tensor in states[0].items()
    }


def combined_config(configs: Sequence[DonorConfig]) -> DonorConfig:
    """Make the config of an average: the place of the first donor, and the training data of all.

    Raises:
        IncompatibleDonorError: The donors have different spans or configs.
    """
    config = copy.deepcopy(configs[0])
    for other in configs[1:]:
        if other.span != config.span:
            raise IncompatibleDonorError(
                f"layers {interval(config.span)} and {interval(other.span)} cannot be averaged; "
                "choose donors of one span"
            )
        if differences := computing_differences(config.native_config(), other.native_config()):
            raise IncompatibleDonorError(f"layers with different configs cannot be averaged: {some(differences)}")
    config.scale, config.metrics, config.init = 1.0, None, "copy"
    config.domain = " + ".join(unite([each.domain for each in configs if each.domain])) or None
    config.datasets = unite(*(each.datasets for each in configs)) or None
    counts = [each.tokens_seen for each in configs]
    config.tokens_seen = None if None in counts else sum(counts)  # type: ignore[arg-type]
    return config
