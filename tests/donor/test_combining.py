"""Combinations of tensors: by hand, and as PEFT computes them."""

from __future__ import annotations

import pytest
import torch

from not_hf.donor.combining import (
    dare_linear,
    dare_ties,
    drop,
    magnitude_prune,
    slerp,
    task_arithmetic,
    ties,
    trim,
)

A, B = torch.tensor([[4.0, -1.0, 2.0, 0.5]]), torch.tensor([[-1.0, -3.0, 0.75, 0.25]])


def test_slerp_keeps_lengths():
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(slerp([x, y], [1, 1]), torch.full((2,), 2**0.5))
    torch.testing.assert_close(slerp([x, 3 * x], [1, 1]), 2 * x)  # one direction: the mean
    torch.testing.assert_close(slerp([x, 0 * x], [1, 1]), x / 2)


def test_task_arithmetic_adds_up():
    assert torch.equal(task_arithmetic([A, B], [2.0, -1.0]), torch.tensor([[9.0, 1.0, 3.25, 0.75]]))


def test_trimming_keeps_the_largest():
    assert torch.equal(trim(A, 0.5), torch.tensor([[4.0, 0.0, 2.0, 0.0]]))
    assert torch.equal(trim(A, 1.0), A) and not trim(A, 0.1).any()
    assert torch.equal(magnitude_prune([A, B], [1.0, 2.0], 0.5), torch.tensor([[2.0, -6.0, 2.0, 0.0]]))


def test_ties_averages_what_has_the_elected_sign():
    # trimmed: 4 · 2 · and -1 -3 · ·; the sums 3 -3 2 0 elect + - + +
    assert torch.equal(ties([A, B], [1.0, 1.0], 0.5), torch.tensor([[4.0, -3.0, 2.0, 0.0]]))
    # untrimmed, all but the first values agree
    assert torch.equal(ties([A, B], [1.0, 2.0], 1.0), torch.tensor([[4.0, -3.5, 1.75, 0.5]]))
    votes = [torch.tensor([-5.0]), torch.tensor([1.0]), torch.tensor([2.0])]
    assert torch.equal(ties(votes, [1.0, 1.0, 1.0], 1.0), torch.tensor([-5.0]))
    assert torch.equal(ties(votes, [1.0, 1.0, 1.0], 1.0, "frequency"), torch.tensor([1.5]))


def test_dropping_keeps_the_expected_value():
    torch.manual_seed(0)
    kept = drop(torch.ones(100_000), 0.25)
    assert set(kept.tolist()) == {0.0, 4.0}
    assert abs(kept.mean() - 1) < 0.02
    torch.manual_seed(1)
    whole = dare_linear([A, B], [1.0, 1.0], 1.0)
    assert torch.equal(whole, A + B)


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_they_are_those_of_peft(density, method):
    peft = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(7, 5, generator=generator) for _ in range(3)]
    weights = [0.5, 2.0, -1.5]
    theirs = torch.tensor(weights)

    def seeded(function, *arguments):
        torch.manual_seed(3)
        return function(*arguments)

    def same(ours, other):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)

    same(task_arithmetic(vectors, weights), peft.task_arithmetic(vectors, theirs))
    same(magnitude_prune(vectors, weights, density), peft.magnitude_prune(vectors, theirs, density))
    same(ties(vectors, weights, density, method), peft.ties(vectors, theirs, density, method))
    if peft.random_pruning(torch.ones(9), 0.5, rescale=True).max() != 2:
        return  # a release that forgets to rescale
    same(seeded(dare_linear, vectors, weights, density), seeded(peft.dare_linear, vectors, theirs, density))
    same(
        seeded(dare_ties, vectors, weights, density, method), seeded(peft.dare_ties, vectors, theirs, density, method)
    )
