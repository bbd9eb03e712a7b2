"""GiGPO of the official code (arXiv 2505.10978) on padded rows; a row is a turn.

Shapes as in ``official.advantages``. The episode-level part has defects 17 and 18 (raw
score for a group of one row; every turn weighs the group's mean); in the step-level part a group of
one gives 0.
"""

from collections.abc import Hashable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.gigpo import discounted_returns, step_group_labels
from megatron_spear.algorithms.group_baselines import RewardArray
from megatron_spear.algorithms.official.advantages import (
    Array,
    grouped_scores,
    groups,
    grpo_step_sample_advantage,
    on_tokens,
    row_scores,
)

Mode = Literal["mean_norm", "mean_std_norm"]


def gigpo_step_returns(
    rewards: Array, traj_uid: Array, *, discount: float
) -> npt.NDArray[np.float32]:
    """float32 ``[N]``: discounted return of each turn within its trajectory, in row order."""
    returns = np.empty(len(rewards), np.float32)
    for rows in groups(traj_uid):
        returns[rows] = discounted_returns(np.asarray(rewards, np.float32)[rows], discount)
    return returns


def gigpo_step_labels(anchor_obs: Array, uid: Array) -> npt.NDArray[np.int64]:
    """int64 ``[N]``: step groups in order of first appearance; anchors are texts or arrays."""
    keys = [
        (str(group), _anchor_key(anchor)) for group, anchor in zip(uid, anchor_obs, strict=True)
    ]
    return step_group_labels(keys)


def gigpo_episode_advantage(
    token_level_rewards: Array,
    mask: Array,
    uid: Array,
    traj_uid: Array,
    *,
    mode: Mode,
    cross: bool = True,
) -> RewardArray:
    """float64 ``[N, T]``: the trajectory's score in its group; by default every turn counts."""
    return grpo_step_sample_advantage(
        token_level_rewards,
        mask,
        uid,
        traj_uid,
        cross=cross,
        normalize_std=mode == "mean_std_norm",
    )


def gigpo_step_advantage(
    step_rewards: Array, mask: Array, anchor_obs: Array, uid: Array, *, mode: Mode
) -> RewardArray:
    """float64 ``[N, T]``: the turn's return in its step group; 0 in a step group of one."""
    values = grouped_scores(
        row_scores(np.asarray(step_rewards)[:, None]),
        gigpo_step_labels(anchor_obs, uid),
        np.ones(len(uid), np.bool_),
        normalize_std=mode == "mean_std_norm",
        lone_mean=None,
    )
    return on_tokens(values, mask)


def gigpo_advantage(
    token_level_rewards: Array,
    step_rewards: Array,
    mask: Array,
    anchor_obs: Array,
    uid: Array,
    traj_uid: Array,
    *,
    mode: Mode,
    step_weight: float = 1.0,
    cross: bool = True,
) -> RewardArray:
    """float64 ``[N, T]``: the episode's part plus ``step_weight`` times the step's."""
    episode = gigpo_episode_advantage(
        token_level_rewards, mask, uid, traj_uid, mode=mode, cross=cross
    )
    step = gigpo_step_advantage(step_rewards, mask, anchor_obs, uid, mode=mode)
    return episode + step_weight * step


def _anchor_key(anchor: Any) -> Hashable:
    """A text, or an array's values: equal by number (0.0 is -0.0), whatever the shape."""
    return anchor if isinstance(anchor, str) else tuple(np.asarray(anchor).ravel().tolist())
