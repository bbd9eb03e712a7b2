"""Advantages of the official code, its defects included, on padded rows of tokens.

The default method is in ``advantages``; these reproduce the recorded numbers and show by how much
the two differ. Shapes: ``token_level_rewards`` and ``mask`` ``[N, T]``, ``uid`` and ``traj_uid``
``[N]`` (prompt and trajectory of a row). All give float64 ``[N, T]``, each row's number on its
masked tokens.

All arithmetic is torch's, in the precision of the scores and in the official order: where a group
hardly spreads, a rounding is divided by a std as small and seen in the result.

- A group of one keeps its raw score as advantage (defect 17; the default gives 0).
- Where a row is a turn, the group's statistics count a trajectory once a turn, so long ones move
  the mean (defect 18; the default counts each trajectory once).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_spear.algorithms.group_baselines import STD_EPSILON, RewardArray
from megatron_spear.algorithms.official.masked import masked_whiten

Array = npt.NDArray[Any]


def grpo_advantage(
    token_level_rewards: Array, mask: Array, uid: Array, *, normalize_std: bool
) -> RewardArray:
    """Score minus the group's mean, optionally over (unbiased std + 1e-6); every row counts."""
    every_row = np.ones(len(uid), np.bool_)
    values = grouped_scores(
        row_scores(token_level_rewards), uid, every_row, normalize_std=normalize_std
    )
    return on_tokens(values, mask)


def grpo_step_sample_advantage(
    token_level_rewards: Array,
    mask: Array,
    uid: Array,
    traj_uid: Array,
    *,
    cross: bool,
    normalize_std: bool,
) -> RewardArray:
    """GRPO where a row is a turn; ``cross`` counts every row, else each trajectory counts once."""
    values = grouped_scores(
        row_scores(token_level_rewards),
        uid,
        counted_rows(uid, traj_uid, cross=cross),
        normalize_std=normalize_std,
    )
    return on_tokens(values, mask)


def rloo_advantage(token_level_rewards: Array, mask: Array, uid: Array) -> RewardArray:
    """Score minus the mean of the other rows of its group; a group of one keeps its score."""
    values = row_scores(token_level_rewards)
    for rows in groups(uid):
        count = len(rows)
        if count > 1:
            scores = values[rows]
            values[rows] = scores * count / (count - 1) - scores.mean() * count / (count - 1)
    return on_tokens(values, mask)


def reinforce_pp_baseline_advantage(
    token_level_rewards: Array, mask: Array, uid: Array
) -> RewardArray:
    """Score minus the group's mean, whitened over all masked tokens of all rows.

    Fewer than two masked tokens, which the official code refuses, give 0.
    """
    every_row = np.ones(len(uid), np.bool_)
    scores = row_scores(token_level_rewards)
    values = grouped_scores(scores, uid, every_row, normalize_std=False)
    trained = torch.from_numpy(np.asarray(mask)).to(values.dtype)
    if trained.sum() < 2:
        return np.zeros(trained.shape)
    tokens = masked_whiten(values[:, None] * trained, trained) * trained
    found: RewardArray = tokens.double().numpy()
    return found


def pass_at_k_advantage(
    token_level_rewards: Array, mask: Array, uid: Array, *, normalize_std: bool
) -> RewardArray:
    """Best minus second best score on the best row of a group, 0 on the others.

    (arXiv 2503.19595.) Raises ValueError for a group of one, which has no second best.
    """
    scores = row_scores(token_level_rewards)
    values = torch.zeros_like(scores)
    for rows in groups(uid):
        if len(rows) < 2:
            raise ValueError(f"pass@k: group {uid[rows[0]]} has one row; at least two are needed")
        (best, second), order = scores[rows].topk(2)
        scale = scores[rows].std() + STD_EPSILON if normalize_std else 1.0
        values[rows[order[0]]] = (best - second) / scale
    return on_tokens(values, mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recalibrated:
    """Replayed rows against the history: medians, advantages ``[N, T]``, and who stays ``[N]``.

    ``keep`` is the math code's test (> 0), ``keep_ge`` the agent code's (>= 0), which also keeps
    rows without masked tokens.
    """

    mean: float
    std: float
    advantages: RewardArray
    keep: npt.NDArray[np.bool_]
    keep_ge: npt.NDArray[np.bool_]


def recalibrated_advantage(
    token_level_rewards: Array,
    mask: Array,
    group_mean_history: Array,
    group_std_history: Array,
    *,
    normalize_std: bool,
    percentile: float = 50.0,
) -> Recalibrated:
    """Score minus the median of past group means, optionally over the median std (SPEAR Eq. 2).

    The medians are taken in float64 and act in the precision of the rewards, in which a score may
    tie with them.
    """
    mean = float(np.percentile(np.asarray(group_mean_history, np.float64), percentile))
    std = float(np.percentile(np.asarray(group_std_history, np.float64), percentile))
    values = row_scores(token_level_rewards) - mean
    if normalize_std:
        values = values / (std + STD_EPSILON)
    advantages = on_tokens(values, mask)
    average = advantages.mean(1)
    return Recalibrated(
        mean=mean, std=std, advantages=advantages, keep=average > 0, keep_ge=average >= 0
    )


def grouped_scores(
    scores: Tensor,
    uid: Array,
    counted: npt.NDArray[np.bool_],
    *,
    normalize_std: bool,
    lone_mean: float | None = 0.0,
) -> Tensor:
    """``[N]``: scores against their group; the statistics read the ``counted`` rows.

    Where one row of a group is counted, its std is taken as 1 and its mean as ``lone_mean``
    (defect 17), None being the row's own score. Equal scores may miss their mean by a rounding.
    """
    values = torch.empty_like(scores)
    for rows in groups(uid):
        known = scores[rows][counted[rows]]
        lone = len(known) == 1
        mean = lone_mean if lone and lone_mean is not None else known.mean()
        centred = scores[rows] - mean
        std = 1.0 if lone else known.std()
        values[rows] = centred / (std + STD_EPSILON) if normalize_std else centred
    return values


def counted_rows(uid: Array, traj_uid: Array, *, cross: bool) -> npt.NDArray[np.bool_]:
    """bool ``[N]``: every row (``cross``), or the first of each trajectory."""
    pairs = list(zip(uid, traj_uid, strict=True))
    first = {pair: row for row, pair in reversed(list(enumerate(pairs)))}
    return np.array([cross or first[pair] == row for row, pair in enumerate(pairs)], np.bool_)


def row_scores(token_level_rewards: Array) -> Tensor:
    """``[N]``: each row's sum, in the rewards' own precision."""
    return torch.from_numpy(np.asarray(token_level_rewards)).sum(-1)


def on_tokens(values: Tensor, mask: Array) -> RewardArray:
    """float64 ``[N, T]``: each row's number on its masked tokens."""
    found: RewardArray = (values[:, None] * torch.from_numpy(np.asarray(mask))).double().numpy()
    return found


def groups(uid: Array) -> Iterator[npt.NDArray[np.intp]]:
    """The rows of each group, in the order of first appearance."""
    names = np.asarray(uid)
    return (np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist()))
