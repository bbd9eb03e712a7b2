"""The shared arithmetic by hand, and against slow readable references."""

import numpy as np
import pytest

from megatron_spear.algorithms.gigpo import discounted_returns, step_advantages, step_group_labels
from megatron_spear.algorithms.group_baselines import leave_one_out, mean_and_variance, whitened


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([], (0.0, 0.0)), ([3.0], (3.0, 0.0)), ([0.1] * 10, (0.1, 0.0)), ([1.0, 0.0], (0.5, 0.5))],
)
def test_mean_and_variance(rewards: list[float], expected: tuple[float, float]) -> None:
    assert mean_and_variance(np.array(rewards)) == expected


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([], []),
        ([0.7], [0.0]),
        ([0.1] * 10, [0.0] * 10),
        ([1.0, 0.0], [1.0, -1.0]),
        ([1.0, 0.0, 0.0], [1.0, -0.5, -0.5]),
    ],
)
def test_leave_one_out(rewards: list[float], expected: list[float]) -> None:
    assert leave_one_out(np.array(rewards)).tolist() == pytest.approx(expected, abs=0.0, rel=1e-15)


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = np.random.default_rng(0).normal(size=7)
    slow = [r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)]
    assert leave_one_out(rewards) == pytest.approx(slow)


def test_whitening_counts_each_value_as_often_as_it_occurs() -> None:
    by_hand = whitened(np.array([1.0, -1.0]), np.array([3.0, 1.0]))
    assert by_hand == pytest.approx([0.5, -1.5], rel=1e-7)
    draw = np.random.default_rng(1)
    values, counts = draw.normal(size=9), draw.integers(0, 5, 9)
    repeated = np.repeat(values, counts)
    slow = (values - repeated.mean()) / (repeated.var(ddof=1) + 1e-8) ** 0.5
    assert whitened(values, counts.astype(np.float64)) == pytest.approx(slow, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "counts"),
    [([0.1] * 3, [9, 9, 9]), ([2.0, 2.0, 1.0], [1, 1, 0]), ([2.0], [0]), ([], [])],
)
def test_nothing_to_whiten_is_exactly_zero(values: list[float], counts: list[int]) -> None:
    result = whitened(np.array(values), np.array(counts, np.float64))
    assert result.tolist() == [0.0] * len(values)


def test_discounted_returns() -> None:
    assert discounted_returns(np.array([1.0, 0.0, 2.0]), 0.5).tolist() == [1.5, 1.0, 2.0]
    assert discounted_returns(np.zeros(0), 0.5).tolist() == []
    assert discounted_returns(np.array([0, 1], np.float32), 0.95).dtype == np.float32


def test_step_groups() -> None:
    keys = [("g", "b"), ("g", "a"), ("h", "b"), ("g", "b")]
    labels = step_group_labels(keys)
    assert labels.tolist() == [0, 1, 2, 0]
    returns = np.array([4.0, 5.0, 6.0, 2.0])
    assert step_advantages(returns, labels, normalize_std=False).tolist() == [1.0, 0.0, 0.0, -1.0]
    over_std = step_advantages(returns, labels, normalize_std=True)
    assert over_std == pytest.approx([1 / (2**0.5 + 1e-6), 0.0, 0.0, -1 / (2**0.5 + 1e-6)])
