"""Group-relative advantages: how much better a trajectory did than its group.

Every advantage function gives one number *per turn* of a trajectory, so that step-level methods
(GiGPO) fit the same shape; GRPO's is the same number for all its turns.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.config.schema import AlgorithmSection
from megatron_spear.types import ScoredGroup, TrajectoryId

RewardArray = npt.NDArray[np.float64]
TurnAdvantages = Mapping[TrajectoryId, RewardArray]
"""float64 ``[num_turns]`` for every trajectory."""

STD_EPSILON = 1e-6


def turn_advantages(
    groups: Sequence[ScoredGroup], section: AlgorithmSection, intrinsic_weight: float
) -> TurnAdvantages:
    """The advantages of every scored trajectory, by the configured method.

    Rewards are shaped with the step's ``intrinsic_weight`` (SPEAR Eq. 6). Each trajectory enters
    its group's statistics once, however many turns or segments it has.
    """
    method = _METHODS[section.advantage]
    result: dict[TrajectoryId, RewardArray] = {}
    for group in groups:
        rewards = shaped_rewards(group, intrinsic_weight)
        values = method(rewards, normalize_std=section.normalize_std)
        for member, value in zip(group.members, values, strict=True):
            trajectory = member.trajectory
            assert trajectory.id not in result, f"trajectory {trajectory.id} occurs twice"
            result[trajectory.id] = np.full(len(trajectory.turns), value)
    return result


def shaped_rewards(group: ScoredGroup, intrinsic_weight: float) -> RewardArray:
    """float64 ``[members]``: outcome + mu * intrinsic + format."""
    return np.array([member.reward.total(intrinsic_weight) for member in group.members], np.float64)


def group_relative(rewards: RewardArray, *, normalize_std: bool) -> RewardArray:
    """Rewards ``[G]`` minus their mean, with ``normalize_std`` over (unbiased std + 1e-6).

    Without the division this is Dr. GRPO (arXiv 2503.20783), with it GRPO (arXiv 2402.03300). Equal
    rewards, and a group of one, give exactly 0: there is nothing to compare with (the official code
    passes the raw reward of a group of one on as its advantage).

    Example: ``[1, 0, 0, 1]`` gives ``[0.5, -0.5, -0.5, 0.5]``; with std ``[0.866, -0.866, ...]``.
    """
    if len(rewards) == 0 or rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    centred: RewardArray = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + STD_EPSILON) if normalize_std else centred


_METHODS = {"grpo": group_relative}
