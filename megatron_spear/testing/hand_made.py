"""Hand-made records for tests of rewards, algorithms, replay and hooks, with known numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.types import (
    Prompt,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    Segment,
    Status,
    ToolCall,
    TrainSample,
    Trajectory,
    TrajectoryId,
    Turn,
    VersionSpan,
)

ONE_LAYER = ModelShape(
    family="qwen3",
    num_layers=1,
    hidden_size=2,
    ffn_size=3,
    num_heads=1,
    num_groups=1,
    head_dim=2,
    vocab_size=5,
    norm_eps=1e-6,
    rope_theta=1e4,
)
"""A model shape small enough to count its FLOPs by hand."""


def make_turn(
    action: str = "look",
    *,
    valid: bool = True,
    num_tokens: int = 2,
    policy_version: int = 0,
    **changes: Any,
) -> Turn:
    """A turn of one observation token and ``num_tokens`` action tokens with log-prob -0.5.

    The action is its one tool call, which succeeds if valid.
    """
    values: dict[str, Any] = {
        "observation_tokens": np.array([7], np.int32),
        "action_tokens": np.arange(1, num_tokens + 1, dtype=np.int32),
        "action_logprobs": np.full(num_tokens, -0.5, np.float32),
        "finish_reason": "stop",
        "versions": (VersionSpan(policy_version, num_tokens),),
        "text": action,
        "action_text": action,
        "valid": valid,
        "tool_calls": (ToolCall(name="act", arguments=action, succeeded=valid),),
        "anchor": f"before {action}",
    }
    return Turn(**(values | changes))


def make_trajectory(
    group: str,
    member: int,
    segments: Sequence[Sequence[Turn]] = ((make_turn(),),),
    *,
    won: bool = False,
    status: Status = Status.COMPLETED,
) -> Trajectory:
    """Attempt ``member`` at the prompt of ``group``."""
    return Trajectory(
        id=TrajectoryId(group=group, member=member),
        prompt=make_prompt(group),
        segments=tuple(Segment(turns=tuple(turns)) for turns in segments),
        status=status,
        won=won,
    )


def make_prompt(group: str) -> Prompt:
    """The prompt of a group."""
    return Prompt(prompt_id=f"prompt-{group}", env="toy")


def make_group(
    group: str, rewards: Sequence[Reward | float], *, policy_version: int = 0, valid: bool = True
) -> ScoredGroup:
    """A scored group of one-turn trajectories; a plain number is an outcome."""
    turn = make_turn(policy_version=policy_version, valid=valid)
    return ScoredGroup(
        group_id=group,
        prompt=make_prompt(group),
        members=tuple(
            ScoredTrajectory(
                trajectory=make_trajectory(group, member, ((turn,),)),
                reward=reward if isinstance(reward, Reward) else Reward(outcome=reward),
            )
            for member, reward in enumerate(rewards)
        ),
    )


def make_sample(
    group: str = "g",
    member: int = 0,
    *,
    mask: Sequence[int] = (0, 1, 1),
    advantage: float = 1.0,
    segment: int = 0,
    num_segments: int = 1,
    **changes: Any,
) -> TrainSample:
    """A sample whose masked tokens carry ``advantage`` and old log-prob -0.5."""
    response_mask = np.array(mask, np.bool_)
    logprobs = np.where(response_mask, -0.5, 0.0).astype(np.float32)
    values: dict[str, Any] = {
        "trajectory_id": TrajectoryId(group=group, member=member),
        "segment": segment,
        "num_segments": num_segments,
        "prompt_id": f"prompt-{group}",
        "token_ids": np.arange(len(response_mask), dtype=np.int32),
        "response_mask": response_mask,
        "rollout_logprobs": logprobs,
        "old_logprobs": logprobs,
        "advantages": np.where(response_mask, advantage, 0.0).astype(np.float32),
        "reward": Reward(outcome=1.0),
        "turn_starts": np.array([1], np.int32),
        "anchors": ("start",),
        "policy_version": 0,
    }
    return TrainSample(**(values | changes))
