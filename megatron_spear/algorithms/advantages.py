"""Group-relative advantages: how much better a trajectory did than its group.

Every advantage function gives one number *per turn* of a trajectory, so that step-level methods
(GiGPO) fit the same shape; GRPO's is the same number for all its turns.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.config.schema import AlgorithmSection
from megatron_spear.types import ScoredGroup, ScoredTrajectory, TrajectoryId

RewardArray = npt.NDArray[np.float64]
TurnAdvantages = Mapping[TrajectoryId, RewardArray]
"""float64 ``[num_turns]`` for every trajectory."""

STD_EPSILON = 1e-6


def turn_advantages(
    groups: Sequence[ScoredGroup], section: AlgorithmSection, intrinsic_weight: float
) -> TurnAdvantages:
    """The advantages of every scored trajectory, by the configured method.

    Rewards are shaped with the step's ``intrinsic_weight`` (SPEAR Eq. 6). Each trajectory enters
    its group's statistics once, however many turns or segments it has. The turns of a trajectory
    differ by their own format rewards: an invalid action is charged to its turn.

    Example: rewards 1 and 0, no invalid action: 0.5 on every turn of the first, -0.5 on the
    second's. Where the first has one invalid turn of two at a penalty of 0.2 (format -0.1): the
    mean is 0.45, its valid turn gets 0.55, its invalid turn 0.35, the second's turns -0.45.
    """
    method = _METHODS[section.advantage]
    result: dict[TrajectoryId, RewardArray] = {}
    for group in groups:
        rewards = shaped_rewards(group, intrinsic_weight)
        own = [_turn_format(member) for member in group.members]
        within = float(np.mean([parts.var() for parts in own])) if own else 0.0
        values, scale = method(rewards, within, normalize_std=section.normalize_std)
        for member, value, parts in zip(group.members, values, own, strict=True):
            trajectory = member.trajectory
            assert trajectory.id not in result, f"trajectory {trajectory.id} occurs twice"
            result[trajectory.id] = value + parts / scale
    return result


def _turn_format(member: ScoredTrajectory) -> RewardArray:
    """float64 ``[num_turns]``: each turn's format reward minus their mean, ``reward.format``."""
    invalid = np.array([not turn.valid for turn in member.trajectory.turns], np.float64)
    if not invalid.any():
        return np.zeros_like(invalid)
    parts: RewardArray = member.reward.format * (invalid / invalid.mean() - 1.0)
    return parts


def shaped_rewards(group: ScoredGroup, intrinsic_weight: float) -> RewardArray:
    """float64 ``[members]``: outcome + mu * intrinsic + format."""
    return np.array([member.reward.total(intrinsic_weight) for member in group.members], np.float64)


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
    equal = len(rewards) == 0 or rewards.max() == rewards.min()
    between = 0.0 if equal else float(rewards.var(ddof=1))
    scale = (between + within) ** 0.5 + STD_EPSILON if normalize_std else 1.0
    centred: RewardArray = np.zeros_like(rewards) if equal else rewards - rewards.mean()
    return centred / scale, scale


_METHODS = {"grpo": group_relative}
