"""Comparing numbers with their group: the arithmetic that the advantage methods share.

Nothing here knows trajectories or turns. Rewards are float64 ``[G]``, one group's.
"""

import numpy as np
import numpy.typing as npt

RewardArray = npt.NDArray[np.float64]

STD_EPSILON = 1e-6
WHITEN_EPSILON = 1e-8


def mean_and_variance(rewards: RewardArray) -> tuple[float, float]:
    """Mean and unbiased variance; of equal numbers exactly that number and 0, of none 0 and 0.

    Example: ``[1, 0, 0, 1]`` gives 0.5 and 1/3; ``[0.1] * 10`` gives 0.1 and 0, without the
    rounding of a sum, which a division by a small std would make large.
    """
    if len(rewards) == 0:
        return 0.0, 0.0
    if rewards.max() == rewards.min():
        return float(rewards[0]), 0.0
    return float(rewards.mean()), float(rewards.var(ddof=1))


def group_relative(
    rewards: RewardArray, within: float = 0.0, *, normalize_std: bool
) -> tuple[RewardArray, float]:
    """Rewards ``[G]`` minus their mean, and what they were divided by.

    With ``normalize_std`` that is the unbiased std + 1e-6 (GRPO, arXiv 2402.03300), where
    ``within``, the mean variance inside the trajectories, counts too; without it 1 (Dr. GRPO, arXiv
    2503.20783). Equal rewards, and a group of one, give exactly 0: there is nothing to compare with
    (the official code passes the raw reward of a group of one on as its advantage).

    Example: ``[1, 0, 0, 1]`` gives ``[0.5, -0.5, -0.5, 0.5]``; with std ``[0.866, -0.866, ...]``.
    """
    mean, between = mean_and_variance(rewards)
    scale = (between + within) ** 0.5 + STD_EPSILON if normalize_std else 1.0
    return (rewards - mean) / scale, scale


def leave_one_out(rewards: RewardArray) -> RewardArray:
    """Rewards ``[G]``, each minus the mean of the *other* members (RLOO, arXiv 2402.14740).

    Equal rewards, and a group of one, give exactly 0.

    Example: ``[1, 0, 0]`` gives ``[1, -0.5, -0.5]``.
    """
    count = len(rewards)
    centred, _ = group_relative(rewards, normalize_std=False)
    return centred * (count / (count - 1)) if count > 1 else centred


def whitened(values: RewardArray, counts: RewardArray) -> RewardArray:
    """Values ``[N]`` with mean 0 and unbiased variance 1, where value ``i`` occurs ``counts[i]``
    times.

    ``(values - mean) / sqrt(variance + 1e-8)``. Equal values, and fewer than two in all, give
    exactly 0. A value that occurs 0 times is moved and scaled like the others.

    Example: values ``[1, -1]`` with counts ``[3, 1]``: mean 0.5, variance (3 * 0.25 + 2.25) / 3 =
    1, result ``[0.5, -1.5]``.
    """
    present = values[counts > 0]
    total = float(counts.sum())
    if total < 2 or present.max() == present.min():
        return np.zeros_like(values)
    centred: RewardArray = values - float(counts @ values) / total
    variance = float(counts @ centred**2) / (total - 1)
    return centred / float(np.sqrt(variance + WHITEN_EPSILON))
