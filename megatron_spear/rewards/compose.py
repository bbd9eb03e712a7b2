"""The reward of a trajectory, in three parts that are never added here (SPEAR Eq. 6).

``Reward.total(mu)`` adds them where they are used, so replay can weigh an old trajectory anew with
the current intrinsic weight.
"""

from megatron_spear.config.method import RewardSection
from megatron_spear.rewards.intrinsic import intrinsic_reward
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory, Trajectory, TrajectoryGroup


def score(group: TrajectoryGroup, section: RewardSection) -> ScoredGroup:
    """The group with a reward for each member that says something about the policy.

    Failures (engine, environment, aborted) are left out: an error never becomes a reward. A group
    in which everything failed comes back without members.
    """
    members = tuple(
        ScoredTrajectory(trajectory=member, reward=trajectory_reward(member, section))
        for member in group.members
        if not member.status.failed
    )
    return ScoredGroup(group_id=group.group_id, prompt=group.prompt, members=members)


def trajectory_reward(trajectory: Trajectory, section: RewardSection) -> Reward:
    """Outcome, intrinsic and format part of one trajectory.

    - outcome: ``success`` where the task was won, else ``failure``.
    - intrinsic: by ``section.intrinsic``; the default pays for each *distinct* successful call, so
      repeating an action, or surviving another turn, earns nothing.
    - format: minus ``invalid_action_penalty`` for each invalid turn, averaged over the turns. The
      advantage puts each turn's own part on that turn (`turn_advantages`), as the paper does.

    Example (defaults): won after "go to desk 1", "look", "look", "take pen 1", all valid, gives
    outcome 1, intrinsic 0.03, format 0. ``parts`` records the counts.
    """
    turns = trajectory.turns
    num_invalid = sum(not turn.valid for turn in turns)
    outcome = section.success if trajectory.won else section.failure
    return Reward(
        outcome=outcome,
        intrinsic=intrinsic_reward(turns, outcome, section.intrinsic),
        format=0.0 - section.invalid_action_penalty * num_invalid / max(len(turns), 1),
        parts={
            "won": float(trajectory.won),
            "num_turns": float(len(turns)),
            "num_invalid_turns": float(num_invalid),
            "num_calls": float(sum(len(turn.tool_calls) for turn in turns)),
        },
    )
