"""GiGPO's step-level part (arXiv 2505.10978): turns that started from the same state, compared.

Where several turns of a prompt's trajectories began with the same anchor (the state's text), what
each of them led to says how good its action was there. Arrays only; ``advantages`` knows the
records.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.group_baselines import RewardArray, group_relative


def discounted_returns(
    rewards: npt.NDArray[np.floating[Any]], discount: float
) -> npt.NDArray[np.floating[Any]]:
    """Each turn's own reward plus the discounted ones after it, in the precision of ``rewards``.

    ``rewards`` are ``[num_turns]`` of one trajectory, in the order of the turns.

    Example: ``[0, 0, 1]`` at 0.5 gives ``[0.25, 0.5, 1]``.
    """
    returns = np.empty_like(rewards)
    later = rewards.dtype.type(0.0)
    factor = rewards.dtype.type(discount)
    for turn in range(len(rewards) - 1, -1, -1):
        later = returns[turn] = rewards[turn] + factor * later
    return returns


def step_group_labels(keys: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """int64 ``[N]``: the step group of each turn; equal keys share a label.

    Labels count up in the order of first appearance. A key names the prompt's group and the anchor.

    Example: ``[("g", "a"), ("g", "b"), ("g", "a")]`` gives ``[0, 1, 0]``.
    """
    labels: dict[Hashable, int] = {}
    return np.array([labels.setdefault(key, len(labels)) for key in keys], np.int64)


def step_advantages(
    returns: RewardArray, labels: npt.NDArray[np.int64], *, normalize_std: bool
) -> RewardArray:
    """float64 ``[N]``: each return minus the mean of its step group, optionally over its std.

    A step group of one, or of equal returns, gives exactly 0.

    Example: returns ``[1, 0, 7]`` with labels ``[0, 0, 1]`` give ``[0.5, -0.5, 0]``.
    """
    values = np.zeros(len(returns), np.float64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        values[rows], _ = group_relative(returns[rows], normalize_std=normalize_std)
    return values
