"""Reward metrics of one step; what was won and how is in the rollout's metrics."""

from collections.abc import Sequence

from megatron_spear.types import ScoredGroup


def reward_metrics(groups: Sequence[ScoredGroup], intrinsic_weight: float) -> dict[str, float]:
    """Means over all scored trajectories of a step, each counted once; {} where there are none.

    ``reward/mean`` is shaped (with mu), the others are its parts before mu. Example: one win and
    one loss, each with intrinsic 0.1 at mu = 0.5, give mean 0.55 and outcome 0.5.
    """
    rewards = [member.reward for group in groups for member in group.members]
    if not rewards:
        return {}
    count = len(rewards)
    return {
        "reward/mean": sum(reward.total(intrinsic_weight) for reward in rewards) / count,
        "reward/outcome": sum(reward.outcome for reward in rewards) / count,
        "reward/intrinsic": sum(reward.intrinsic for reward in rewards) / count,
        "reward/format": sum(reward.format for reward in rewards) / count,
    }
