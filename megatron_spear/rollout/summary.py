"""Rollout metrics of one step, over all trajectories, each counted once."""

from collections.abc import Sequence

from megatron_spear.errors import EngineError
from megatron_spear.types import Status, TrajectoryGroup

_TRUNCATED = (Status.TRUNCATED_LENGTH, Status.TRUNCATED_TURNS)


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """``rollout/...`` metrics; means are over trajectories that did not fail.

    ``branches`` are the segments of a trajectory after its first. ``token_drift`` counts tokens
    that would have been trained on and are not what the engine was given and sampled, over all
    trajectories: one that has any failed (`drift.TokenDrift`).

    ``tool_calls_mean`` are calls a trajectory (in a game each action is one) and
    ``tool_success_fraction`` those of them that worked.

    Example: one win in 2 turns and one loss in 6, no failure: success 0.5, turns_mean 4.0, failed
    0.
    """
    members = [member for group in groups for member in group.members]
    failures = [failure for group in groups for failure in group.failures]
    metrics = {
        "rollout/failed": float(len(failures)),
        "rollout/token_drift": float(sum(f.info.get("token_drift", 0) for f in failures)),
        "rollout/num_trajectories": float(len(members)),
    }
    if not members:
        return metrics
    count = len(members)
    turns = [turn for member in members for turn in member.turns]
    calls = [call for turn in turns for call in turn.tool_calls]
    segments = [segment for member in members for segment in member.segments]
    metrics |= {
        "rollout/success": sum(member.won for member in members) / count,
        "rollout/env_reward": sum(member.env_reward for member in members) / count,
        "rollout/turns_mean": len(turns) / count,
        "rollout/action_tokens": float(sum(member.num_action_tokens for member in members)),
        "rollout/valid_fraction": sum(turn.valid for turn in turns) / max(1, len(turns)),
        "rollout/tool_calls_mean": len(calls) / count,
        "rollout/tool_success_fraction": sum(c.succeeded for c in calls) / max(1, len(calls)),
        "rollout/branches": sum(max(0, len(m.segments) - 1) for m in members) / count,
        "rollout/truncated_fraction": sum(m.status in _TRUNCATED for m in members) / count,
        "rollout/context_full_fraction": (
            sum(m.status is Status.TRUNCATED_LENGTH for m in members) / count
        ),
        "rollout/context_tokens_mean": sum(s.num_tokens for s in segments) / max(1, len(segments)),
        "rollout/max_context": float(max((s.num_tokens for s in segments), default=0)),
    }
    return metrics


def lag_metrics(
    groups: Sequence[TrajectoryGroup], policy_version: int, max_lag: int
) -> dict[str, float]:
    """How many versions behind ``policy_version`` the action tokens were drawn.

    ``rollout/lag_mean`` is over tokens, ``rollout/lag_<k>_fraction`` their histogram for k = 0 to
    ``max_lag``, ``rollout/mixed_versions_fraction`` the share of trajectories of more than one
    version. Raises EngineError where a version is not in that range: those weights were never, or
    should no longer be, served.

    Example: 43 tokens of version 6 and 21 of version 7 at version 7: mean 43/64, lag_1 43/64.
    """
    counts, mixed, members = [0] * (max_lag + 1), 0, 0
    for member in (member for group in groups for member in group.members):
        versions = set()
        for version, num_tokens in (span for turn in member.turns for span in turn.versions):
            lag = policy_version - version
            if not 0 <= lag <= max_lag:
                raise EngineError(
                    f"{num_tokens} tokens of trajectory {member.id} are of policy version "
                    f"{version}; expected {policy_version - max_lag} to {policy_version} "
                    f"(rollout.max_lag={max_lag}); look for a server that missed an update"
                )
            counts[lag] += num_tokens
            versions.add(version)
        mixed, members = mixed + (len(versions) > 1), members + 1
    total = sum(counts)
    if not total:
        return {}
    fractions = {f"rollout/lag_{lag}_fraction": n / total for lag, n in enumerate(counts)}
    return fractions | {
        "rollout/lag_mean": sum(lag * n for lag, n in enumerate(counts)) / total,
        "rollout/mixed_versions_fraction": mixed / members,
    }
