"""Reward metrics of one step; success is the outcome alone, so it compares across steps."""

from collections.abc import Sequence

from megatron_spear.types import ScoredGroup


def reward_metrics(groups: Sequence[ScoredGroup], intrinsic_weight: float) -> dict[str, float]:
    """Means over all scored trajectories of a step, each counted once; {} where there are none.

    ``reward/mean`` is shaped (with mu), ``reward/success`` the share won. Example: one win and one
    loss, each with intrinsic 0.1 at mu = 0.5, give mean 0.55 and success 0.5.
    """
    members = [member for group in groups for member in group.members]
    if not members:
        return {}
    count = len(members)
    rewards = [member.reward for member in members]
    turns = [turn for member in members for turn in member.trajectory.turns]
    result = {
        "reward/mean": sum(reward.total(intrinsic_weight) for reward in rewards) / count,
        "reward/success": sum(member.trajectory.won for member in members) / count,
        "reward/outcome": sum(reward.outcome for reward in rewards) / count,
        "reward/intrinsic": sum(reward.intrinsic for reward in rewards) / count,
        "reward/format": sum(reward.format for reward in rewards) / count,
        "reward/turns_mean": len(turns) / count,
        "reward/num_scored": float(count),
    }
    if turns:
        result["reward/valid_action_fraction"] = sum(turn.valid for turn in turns) / len(turns)
    return result
