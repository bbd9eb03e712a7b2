"""From scored trajectories to training samples: one sample a segment."""

from collections.abc import Sequence

import numpy as np

from megatron_spear.algorithms.advantages import TurnAdvantages
from megatron_spear.algorithms.filters import fully_marked
from megatron_spear.algorithms.group_baselines import RewardArray
from megatron_spear.types import (
    FloatArray,
    RowKey,
    ScoredGroup,
    ScoredTrajectory,
    Segment,
    TokenArray,
    TrainSample,
)


def make_samples(
    groups: Sequence[ScoredGroup],
    advantages: TurnAdvantages,
    marked: frozenset[RowKey] = frozenset(),
) -> list[TrainSample]:
    """One ``TrainSample`` for every segment of every member, in the order of the groups.

    ``advantages[trajectory_id]`` is float64 ``[num_turns]``; a turn's number is spread over its
    action tokens. A ``marked`` row keeps its tokens, as context, and has no response: mask False
    and advantage 0, so that nothing is learned from it. A trajectory of marked rows alone may be
    missing from ``advantages``: it left the statistics. ``old_logprobs`` start as the engine's
    ``rollout_logprobs``; the loop replaces them with the policy's own (``dataclasses.replace``).
    ``policy_version`` is the oldest among the segment's tokens.
    """
    return [
        sample
        for group in groups
        for member in group.members
        for sample in _trajectory_samples(member, advantages, marked)
    ]


def _trajectory_samples(
    member: ScoredTrajectory, known: TurnAdvantages, marked: frozenset[RowKey]
) -> list[TrainSample]:
    trajectory = member.trajectory
    advantages = known.get(trajectory.id)
    if advantages is None:
        assert fully_marked(trajectory, marked), f"{trajectory.id} has no advantages"
        advantages = np.zeros(len(trajectory.turns))
    assert len(advantages) == len(trajectory.turns), "one advantage per turn"
    samples, first_turn = [], 0
    for index, segment in enumerate(trajectory.segments):
        assert segment.turns, f"segment {index} of trajectory {trajectory.id} has no turn"
        last_turn = first_turn + len(segment.turns)
        starts = segment.turn_starts
        learned = segment.response_mask & ((trajectory.id, index) not in marked)
        values = _token_advantages(segment, starts, advantages[first_turn:last_turn])
        samples.append(
            TrainSample(
                trajectory_id=trajectory.id,
                segment=index,
                num_segments=len(trajectory.segments),
                prompt_id=trajectory.prompt.prompt_id,
                token_ids=segment.token_ids,
                response_mask=learned,
                rollout_logprobs=segment.rollout_logprobs,
                old_logprobs=segment.rollout_logprobs,
                advantages=np.where(learned, values, np.float32(0.0)),
                reward=member.reward,
                turn_starts=starts,
                anchors=tuple(turn.anchor for turn in segment.turns),
                policy_version=min(
                    span.policy_version for turn in segment.turns for span in turn.versions
                ),
                tool_calls=sum(len(turn.tool_calls) for turn in segment.turns),
            )
        )
        first_turn = last_turn
    return samples


def _token_advantages(segment: Segment, starts: TokenArray, advantages: RewardArray) -> FloatArray:
    """float32 ``[L]``: each turn's advantage on its action tokens, 0 elsewhere."""
    values = np.zeros(segment.num_tokens, np.float32)
    for turn, start, advantage in zip(segment.turns, starts, advantages, strict=True):
        values[start : start + len(turn.action_tokens)] = advantage
    return values
