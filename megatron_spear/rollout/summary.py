"""Rollout metrics of one step, over all trajectories, each counted once."""

from collections.abc import Sequence

from megatron_spear.types import Status, TrajectoryGroup

_TRUNCATED = (Status.TRUNCATED_LENGTH, Status.TRUNCATED_TURNS)


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """``rollout/...`` metrics; means are over trajectories that did not fail.

    Example: one win in 2 turns and one loss in 6, no failure: success 0.5, turns_mean 4.0, failed
    0.
    """
    members = [member for group in groups for member in group.members]
    metrics = {
        "rollout/failed": float(sum(len(group.failures) for group in groups)),
        "rollout/num_trajectories": float(len(members)),
    }
    if not members:
        return metrics
    count = len(members)
    turns = [turn for member in members for turn in member.turns]
    segments = [segment for member in members for segment in member.segments]
    metrics |= {
        "rollout/success": sum(member.won for member in members) / count,
        "rollout/env_reward": sum(member.env_reward for member in members) / count,
        "rollout/turns_mean": len(turns) / count,
        "rollout/action_tokens": float(sum(member.num_action_tokens for member in members)),
        "rollout/valid_fraction": sum(turn.valid for turn in turns) / max(1, len(turns)),
        "rollout/truncated_fraction": sum(m.status in _TRUNCATED for m in members) / count,
        "rollout/context_full_fraction": (
            sum(m.status is Status.TRUNCATED_LENGTH for m in members) / count
        ),
        "rollout/context_tokens_mean": sum(s.num_tokens for s in segments) / max(1, len(segments)),
        "rollout/max_context": float(max((s.num_tokens for s in segments), default=0)),
    }
    return metrics
