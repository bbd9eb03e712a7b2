"""Rows of the official code from scored groups: a row is a segment, its score one number.

| ``tree`` | a row | its score | groups of the filter |
|---|---|---|---|
| ``math`` | a trajectory | the shaped reward | blocks of ``group_size`` trajectories |
| ``agent`` | a turn | the trajectory's, its own invalid action charged in full | equal prompts |

A row's sample carries its own score: the ``format`` part of its reward is the row's. Advantages are
those of ``official.advantages`` and ``official.gigpo``. The agent tree cuts the rows that are left
to a power of two, drawn.

Marked rows count in all group statistics (defect 20); only their advantage is 0. The math tree
clears their response mask, the agent tree rebuilds it (defect 21), so there they go on counting in
means over tokens and get KL and entropy bonus.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.advantages import TurnAdvantages, format_rewards
from megatron_spear.algorithms.group_baselines import RewardArray
from megatron_spear.algorithms.official.advantages import (
    grpo_advantage,
    grpo_step_sample_advantage,
    reinforce_pp_baseline_advantage,
    rloo_advantage,
)
from megatron_spear.algorithms.official.filters import (
    keep_spread_blocks,
    keep_spread_prompts,
    power_of_two_cut,
    shuffled,
)
from megatron_spear.algorithms.official.gigpo import gigpo_advantage, gigpo_step_returns
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.types import RowKey, ScoredGroup, ScoredTrajectory, StepContext, TrainSample


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A sample, its shaped reward now, and the discounted return of its first turn (GiGPO)."""

    sample: TrainSample
    score: float
    step_return: float
    marked: bool


def official_rows(
    ctx: StepContext,
    groups: Sequence[ScoredGroup],
    marked: frozenset[RowKey],
    section: AlgorithmSection,
    group_size: int,
) -> tuple[list[TrainSample], dict[str, float]]:
    """The rows a step goes on with, with their advantages, and the filter's metrics.

    In the math tree a group with failed members is left out: the official blocks would be shifted.
    """
    agent = section.official.tree == "agent"
    complete = [g for g in groups if g.members and (agent or len(g.members) == group_size)]
    members = [member for group in complete for member in group.members]
    rows = [row for member in members for row in _rows(ctx, member, marked, section)]
    metrics = {
        "filter/num_groups": float(len(groups)),
        "filter/num_incomplete_groups": float(len(groups) - len(complete)),
    }
    if not rows:
        return [], metrics
    kept, found = _filtered(ctx, rows, section, group_size)
    advantages = _advantages(kept, section)
    return [
        _finished(row, value, clear=row.marked and not agent)
        for row, value in zip(kept, advantages, strict=True)
    ], metrics | found


def _rows(
    ctx: StepContext,
    member: ScoredTrajectory,
    marked: frozenset[RowKey],
    section: AlgorithmSection,
) -> list[_Row]:
    """The rows of one trajectory, advantages still 0."""
    trajectory, weight = member.trajectory, ctx.coefficients.intrinsic_weight
    none: TurnAdvantages = {trajectory.id: np.zeros(len(trajectory.turns))}
    scored = ScoredGroup(group_id=trajectory.id.group, prompt=trajectory.prompt, members=(member,))
    samples = make_samples([scored], none)
    outcome = np.zeros(len(trajectory.turns), np.float32)
    outcome[-1:] = member.reward.outcome
    returns = gigpo_step_returns(
        outcome, np.full(len(outcome), "t"), discount=section.gigpo.discount
    )
    first, rows = 0, []
    for sample, segment in zip(samples, trajectory.segments, strict=True):
        turns = slice(first, first + len(segment.turns))
        charge = float(format_rewards(member)[turns].sum())
        reward = member.reward
        if section.official.tree == "agent":  # the row's own penalty instead of the mean of all
            reward = replace(reward, format=charge)
        rows.append(
            _Row(
                sample=replace(sample, reward=reward),
                score=reward.total(weight),
                step_return=float(returns[first]) + charge,
                marked=(trajectory.id, sample.segment) in marked,
            )
        )
        first = turns.stop
    return rows


def _filtered(
    ctx: StepContext, rows: list[_Row], section: AlgorithmSection, group_size: int
) -> tuple[list[_Row], dict[str, float]]:
    """The rows of the groups that spread most; in the agent tree a power of two of them."""
    fraction = section.keep_groups_fraction
    scores = [row.score for row in rows]
    if section.official.tree == "math":
        chosen, metrics = keep_spread_blocks(scores, group_size, fraction)
    else:
        prompts = [row.sample.trajectory_id.group for row in rows]
        trajectories = [str(row.sample.trajectory_id) for row in rows]
        chosen, _, metrics = keep_spread_prompts(scores, prompts, trajectories, fraction)
        chosen = power_of_two_cut(shuffled(chosen, ctx.seed, ctx.step, "official cut"))
    return [rows[index] for index in chosen], metrics


def _advantages(rows: Sequence[_Row], section: AlgorithmSection) -> RewardArray:
    """float64 ``[N]``: each row's advantage (0 for a marked row and one without sampled tokens)."""
    if not rows:
        return np.zeros(0)
    counts = np.array([int(r.sample.response_mask.sum()) * (not r.marked) for r in rows])
    mask = np.arange(max(counts.max(), 1))[None, :] < counts[:, None]
    rewards = np.zeros(mask.shape, np.float64)
    rewards[:, 0] = [row.score for row in rows]
    columns = _Columns(
        rewards=rewards,
        mask=mask,
        uid=np.array([row.sample.trajectory_id.group for row in rows]),
        trajectories=np.array([str(row.sample.trajectory_id) for row in rows]),
    )
    return _METHODS[section.advantage](columns, rows, section)[:, 0]


class _Columns(NamedTuple):
    """What the official functions take: ``rewards``, ``mask`` ``[N, T]``, the others ``[N]``."""

    rewards: RewardArray
    mask: npt.NDArray[np.bool_]
    uid: npt.NDArray[np.str_]
    trajectories: npt.NDArray[np.str_]


def _grpo(given: _Columns, rows: Sequence[_Row], section: AlgorithmSection) -> RewardArray:
    normalize_std = section.normalize_std
    if section.official.tree == "math":
        return grpo_advantage(*given[:3], normalize_std=normalize_std)
    cross = section.official.every_turn_counts
    return grpo_step_sample_advantage(*given, cross=cross, normalize_std=normalize_std)


def _gigpo(given: _Columns, rows: Sequence[_Row], section: AlgorithmSection) -> RewardArray:
    return gigpo_advantage(
        given.rewards,
        np.array([row.step_return for row in rows]),
        given.mask,
        np.array([row.sample.anchors[0] for row in rows], object),
        given.uid,
        given.trajectories,
        mode=section.gigpo.mode,
        step_weight=section.gigpo.step_weight,
        cross=section.official.every_turn_counts,
    )


_METHODS: dict[str, Callable[[_Columns, Sequence[_Row], AlgorithmSection], RewardArray]] = {
    "grpo": _grpo,
    "gigpo": _gigpo,
    "rloo": lambda given, *_: rloo_advantage(*given[:3]),
    "reinforce_pp_baseline": lambda given, *_: reinforce_pp_baseline_advantage(*given[:3]),
}


def _finished(row: _Row, value: float, *, clear: bool) -> TrainSample:
    mask = row.sample.response_mask & (not clear)
    advantages = np.where(mask, value, 0.0).astype(np.float32)
    return replace(row.sample, response_mask=mask, advantages=advantages)
