"""Which groups are trained on: those whose rewards spread most (RAGEN, arXiv 2504.20073), judged by
the members that may be learned from."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_spear.algorithms.advantages import shaped_rewards
from megatron_spear.algorithms.draws import stream_key
from megatron_spear.algorithms.group_baselines import RewardArray, mean_and_variance
from megatron_spear.types import RowKey, ScoredGroup, Trajectory

# Spreads that differ by rounding alone (the same rewards in another order) must tie.
_SPREAD_DIGITS = 12


def counted_groups(
    groups: Sequence[ScoredGroup], marked: frozenset[RowKey]
) -> tuple[ScoredGroup, ...]:
    """The groups without the members that nothing is learned from: all their rows are ``marked``.

    A trajectory with one row left counts whole. Example: rewards 1, 1, 0 of which the 0 is overlong
    give a group of 1, 1: there is nothing to learn from it, where the official code pushes both up.
    """
    return tuple(
        replace(
            group,
            members=tuple(m for m in group.members if not fully_marked(m.trajectory, marked)),
        )
        for group in groups
    )


def fully_marked(trajectory: Trajectory, marked: frozenset[RowKey]) -> bool:
    """Whether every row of a trajectory is ``marked``."""
    return all((trajectory.id, index) in marked for index in range(len(trajectory.segments)))


def keep_groups(
    groups: Sequence[ScoredGroup], fraction: float, intrinsic_weight: float
) -> tuple[tuple[ScoredGroup, ...], dict[str, float]]:
    """The ``fraction`` of groups with the highest in-group reward std, and metrics; order is kept.

    floor(fraction * groups) are kept, but at least one. Ties are drawn, keyed by the group id, in
    which seed, step and prompt are: the choice depends neither on the order in which groups arrived
    nor on what a prompt is called (ALFWorld's begin with the task type). Groups without members
    never count.

    Example: four groups with spreads 0.5 (a), 0 (b), 0.5 (c), 0.2 (d) and fraction 0.75 keep a, c,
    d.
    """
    present = [group for group in groups if group.members]
    spreads = [reward_spread(group, intrinsic_weight) for group in present]
    num_kept = min(len(present), max(1, math.floor(fraction * len(present) + 1e-9)))
    draws = [stream_key("keep", group.group_id) for group in present]
    ranked = sorted(range(len(present)), key=lambda i: (-spreads[i], draws[i]))
    chosen = sorted(ranked[:num_kept])
    metrics = {
        "filter/num_groups": float(len(groups)),
        "filter/num_empty_groups": float(len(groups) - len(present)),
        "filter/num_kept_groups": float(num_kept),
    }
    if present:
        metrics["filter/spread_mean"] = sum(spreads) / len(spreads)
        metrics["filter/kept_spread_mean"] = sum(spreads[i] for i in chosen) / num_kept
        metrics["filter/zero_spread_fraction"] = spreads.count(0.0) / len(spreads)
    return tuple(present[i] for i in chosen), metrics


def reward_spread(group: ScoredGroup, intrinsic_weight: float) -> float:
    """Unbiased standard deviation of the group's shaped rewards; exactly 0 for equal ones and for
    fewer than two members."""
    rewards: RewardArray = np.sort(shaped_rewards(group, intrinsic_weight))
    return round(math.sqrt(mean_and_variance(rewards)[1]), _SPREAD_DIGITS)
