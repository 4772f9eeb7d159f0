"""Combining tensors of one shape into one: means of weights, and sums of what training changed.

The second kind works on task vectors, trained minus base. Weights, density and the choice of signs mean what they mean
in PEFT's `add_weighted_adapter`; as there and in mergekit, each tensor is trimmed for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensors = Sequence[torch.Tensor]
Weights = Sequence[float]


def linear(tensors: Tensors, weights: Weights) -> torch.Tensor:
    """Compute the weighted mean of tensors, `sum(w_i t_i) / sum(w_i)`."""
    return task_arithmetic(tensors, weights) / sum(weights)


def slerp(tensors: Tensors, weights: Weights) -> torch.Tensor:
    """Average two tensors along the arc between them, which preserves their length.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985, on flattened tensors, at `w_2 / (w_1 + w_2)`.
    """
    a, b = tensors
    t = weights[1] / sum(weights)
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if not (a.any() and b.any() and torch.sin(angle) > 1e-4):  # zero or parallel: there is no arc
        return linear(tensors, weights)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def task_arithmetic(vectors: Tensors, weights: Weights) -> torch.Tensor:
    """Add up task vectors, `sum(w_i v_i)`.

    Source: Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089, section 2.
    """
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))  # type: ignore[return-value]


def magnitude_prune(vectors: Tensors, weights: Weights, density: float) -> torch.Tensor:
    """Add up task vectors of which only the largest values are kept."""
    return task_arithmetic([trim(vector, density) for vector in vectors], weights)


def ties(vectors: Tensors, weights: Weights, density: float, majority_sign_method: str = "total") -> torch.Tensor:
    """Trim task vectors, elect a sign for each value, and average those that have it.

    Source: Yadav et al., "TIES-Merging: resolving interference when merging models", arXiv 2306.01708, algorithm 1.
    """
    return agreeing_mean([trim(vector, density) for vector in vectors], weights, majority_sign_method)


def dare_linear(vectors: Tensors, weights: Weights, density: float) -> torch.Tensor:
    """Add up task vectors of which a random share is dropped and the rest rescaled.

    Source: Yu et al., "Language models are super Mario", arXiv 2311.03099, equations 1 and 2 with task arithmetic.
    """
    return task_arithmetic([drop(vector, density) for vector in vectors], weights)


def dare_ties(vectors: Tensors, weights: Weights, density: float, majority_sign_method: str = "total") -> torch.Tensor:
    """Drop and rescale as in `dare_linear`, then elect signs and average as in `ties`.

    Source: arXiv 2311.03099, with TIES-Merging in the place of task arithmetic.
    """
    return agreeing_mean([drop(vector, density) for vector in vectors], weights, majority_sign_method)


def trim(vector: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the share `density` of the values, the largest in magnitude; the others become zero."""
    flat = vector.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).reshape(vector.shape)


def drop(vector: torch.Tensor, density: float) -> torch.Tensor:
    """Keep each value with probability `density`, divided by it; the others become zero. `torch.manual_seed` rules."""
    return vector * torch.bernoulli(torch.full_like(vector, density)) / density


def agreeing_mean(vectors: Tensors, weights: Weights, majority_sign_method: str) -> torch.Tensor:
    """Average, value by value, the weighted vectors that have the elected sign; zero where all are zero.

    Args:
        vectors: Task vectors, of which zeros do not count.
        weights: A factor for each; they do not vote.
        majority_sign_method: `"total"` elects the sign of the sum, `"frequency"` the more frequent one; `+` if even.
    """
    stacked = torch.stack(list(vectors))  # (vectors, …)
    votes = stacked if majority_sign_method == "total" else stacked.sign()
    elected = torch.where(votes.sum(dim=0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    weighted = torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)])
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


Combination = Callable[..., torch.Tensor]

MEANS: dict[str, Combination] = {"linear": linear, "slerp": slerp}
SPARSE: dict[str, Combination] = {  # have a density
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
OF_VECTORS: dict[str, Combination] = {"task_arithmetic": task_arithmetic, **SPARSE}
SIGN_METHODS = ("total", "frequency")
