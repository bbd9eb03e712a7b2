"""Advantages: how much better a trajectory, or a turn of it, did than what it is compared with.

Every method gives one number *per turn* of a trajectory, so that step-level methods fit the same
shape. ``R`` is the shaped reward of a trajectory (SPEAR Eq. 6); each trajectory enters its group's
statistics once, however many turns or segments it has.

| ``algorithm.advantage`` | a trajectory's number | source |
|---|---|---|
| ``grpo`` | R - group mean, optionally over the std | arXiv 2402.03300, 2503.20783 |
| ``rloo`` | R - mean of the other members | arXiv 2402.14740 |
| ``reinforce_pp_baseline`` | R - group mean, whitened over the step's tokens | arXiv 2501.03262 |
| ``gigpo`` | grpo's + w * (turn's return - mean of its step group) | arXiv 2505.10978 |

In all of them an invalid action is charged to its turn: the turns of a trajectory differ by their
own format rewards. Turns of marked rows, of which nothing is learned, do not count where turns or
tokens are what is compared.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from megatron_spear.algorithms.gigpo import discounted_returns, step_advantages, step_group_labels
from megatron_spear.algorithms.group_baselines import (
    RewardArray,
    group_relative,
    leave_one_out,
    whitened,
)
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.errors import ConfigError, DataError
from megatron_spear.types import RowKey, ScoredGroup, ScoredTrajectory, TrajectoryId, Turn

TurnAdvantages = Mapping[TrajectoryId, RewardArray]
"""float64 ``[num_turns]`` for every trajectory."""


def turn_advantages(
    groups: Sequence[ScoredGroup],
    section: AlgorithmSection,
    intrinsic_weight: float,
    marked: frozenset[RowKey] = frozenset(),
) -> TurnAdvantages:
    """The advantages of every scored trajectory of a step, by the configured method.

    Rewards are shaped with the step's ``intrinsic_weight``. Tokens of ``marked`` rows do not count
    in the whitening, nor their turns in step groups (unless ``row_filters.in_group_statistics``); a
    trajectory with one row left counts whole in its group. Raises ConfigError where GiGPO is asked
    for and no turn has an anchor.

    Example (grpo): rewards 1 and 0, no invalid action: 0.5 on every turn of the first, -0.5 on the
    second's. Where the first has one invalid turn of two at a penalty of 0.2 (format -0.1): the
    mean is 0.45, its valid turn gets 0.55, its invalid turn 0.35, the second's turns -0.45.
    """
    ids = Counter(member.trajectory.id for member in _members(groups))
    repeated = [str(id_) for id_, count in ids.items() if count > 1]
    assert not repeated, f"trajectories that occur twice: {repeated}"
    return _METHODS[section.advantage](groups, section, intrinsic_weight, marked)


def shaped_rewards(group: ScoredGroup, intrinsic_weight: float) -> RewardArray:
    """float64 ``[members]``: outcome + mu * intrinsic + format.

    Raises DataError for a reward that is no finite number: it would spoil its group and the step.
    """
    totals = [member.reward.total(intrinsic_weight) for member in group.members]
    for member, total in zip(group.members, totals, strict=True):
        if not math.isfinite(total):
            raise DataError(
                f"trajectory {member.trajectory.id}: got a reward of {total} ({member.reward}), "
                "expected a finite number; look for it in what scores the trajectories"
            )
    return np.array(totals, np.float64)


def turn_returns(member: ScoredTrajectory, discount: float) -> RewardArray:
    """float64 ``[num_turns]``: the outcome, discounted from the last turn back, and each turn's own
    format reward, which turns before it do not answer for.

    The intrinsic reward is for the trajectory as a whole (distinct actions) and is on no turn.

    Example: won (outcome 1) in three turns, the second invalid at a penalty of 0.3 (format -0.1),
    at a discount of 0.5: ``[0.25, 0.2, 1]``.
    """
    outcome = np.zeros(len(_turns(member)), np.float64)
    outcome[-1:] = member.reward.outcome
    return discounted_returns(outcome, discount) + format_rewards(member)


def format_rewards(member: ScoredTrajectory) -> RewardArray:
    """float64 ``[num_turns]``: ``reward.format``, a mean over the turns, on the invalid ones."""
    invalid = np.array([not turn.valid for turn in _turns(member)], np.float64)
    return member.reward.format * (invalid / invalid.mean()) if invalid.any() else invalid


def _grpo(
    groups: Sequence[ScoredGroup],
    section: AlgorithmSection,
    intrinsic_weight: float,
    marked: frozenset[RowKey],
) -> dict[TrajectoryId, RewardArray]:
    return _episode_relative(groups, intrinsic_weight, normalize_std=section.normalize_std)


def _rloo(
    groups: Sequence[ScoredGroup],
    section: AlgorithmSection,
    intrinsic_weight: float,
    marked: frozenset[RowKey],
) -> dict[TrajectoryId, RewardArray]:
    result = {}
    for group in groups:
        values = leave_one_out(shaped_rewards(group, intrinsic_weight))
        for member, value in zip(group.members, values, strict=True):
            result[member.trajectory.id] = value + _format_deviations(member)
    return result


def _reinforce_pp_baseline(
    groups: Sequence[ScoredGroup],
    section: AlgorithmSection,
    intrinsic_weight: float,
    marked: frozenset[RowKey],
) -> dict[TrajectoryId, RewardArray]:
    """Whitened over the tokens to learn from: a turn counts as often as it has action tokens, one
    of a marked row not at all."""
    centred = _episode_relative(groups, intrinsic_weight, normalize_std=False)
    if not centred:
        return centred
    counts = [
        0 if left_out else len(turn.action_tokens)
        for member in _members(groups)
        for turn, left_out in zip(_turns(member), _marked_turns(member, marked), strict=True)
    ]
    values = whitened(np.concatenate(list(centred.values())), np.array(counts, np.float64))
    return _by_trajectory(groups, values)


def _gigpo(
    groups: Sequence[ScoredGroup],
    section: AlgorithmSection,
    intrinsic_weight: float,
    marked: frozenset[RowKey],
) -> dict[TrajectoryId, RewardArray]:
    """A turn without an anchor, or of a marked row, is a step group of its own and gets the
    episode's part alone."""
    gigpo = section.gigpo
    normalize_std = gigpo.mode == "mean_std_norm"
    episode = _episode_relative(groups, intrinsic_weight, normalize_std=normalize_std)
    turns = [
        (group.group_id, turn.anchor)
        for group in groups
        for member in group.members
        for turn in _turns(member)
    ]
    if not turns:
        return episode
    if not any(anchor for _, anchor in turns):
        raise ConfigError(
            "algorithm.advantage: got 'gigpo', which compares turns with the same anchor, and no "
            "turn of this step has one; give `anchor` in the environment's info, or use 'grpo'"
        )
    alone = [not anchor for _, anchor in turns]
    if not section.row_filters.in_group_statistics:
        left_out = (flag for m in _members(groups) for flag in _marked_turns(m, marked))
        alone = [a or b for a, b in zip(alone, left_out, strict=True)]
    keys = [(*turn, index if alone[index] else None) for index, turn in enumerate(turns)]
    returns = np.concatenate([turn_returns(m, gigpo.discount) for m in _members(groups)])
    values = step_advantages(returns, step_group_labels(keys), normalize_std=normalize_std)
    step = _by_trajectory(groups, gigpo.step_weight * values)
    return {id_: values + step[id_] for id_, values in episode.items()}


def _episode_relative(
    groups: Sequence[ScoredGroup], intrinsic_weight: float, *, normalize_std: bool
) -> dict[TrajectoryId, RewardArray]:
    """Each trajectory's reward against its group's, plus what its turns differ by."""
    result = {}
    for group in groups:
        own = [_format_deviations(member) for member in group.members]
        within = float(np.mean([parts.var() for parts in own])) if own else 0.0
        rewards = shaped_rewards(group, intrinsic_weight)
        values, scale = group_relative(rewards, within, normalize_std=normalize_std)
        for member, value, parts in zip(group.members, values, own, strict=True):
            result[member.trajectory.id] = value + parts / scale
    return result


def _format_deviations(member: ScoredTrajectory) -> RewardArray:
    """float64 ``[num_turns]``: each turn's format reward minus their mean, ``reward.format``."""
    charged = format_rewards(member)
    return charged - member.reward.format if charged.any() else charged


def _members(groups: Sequence[ScoredGroup]) -> Iterator[ScoredTrajectory]:
    return (member for group in groups for member in group.members)


def _turns(member: ScoredTrajectory) -> tuple[Turn, ...]:
    return member.trajectory.turns


def _marked_turns(member: ScoredTrajectory, marked: frozenset[RowKey]) -> list[bool]:
    """For each turn whether its row is marked."""
    trajectory = member.trajectory
    return [
        (trajectory.id, index) in marked
        for index, segment in enumerate(trajectory.segments)
        for _ in segment.turns
    ]


def _by_trajectory(
    groups: Sequence[ScoredGroup], values: RewardArray
) -> dict[TrajectoryId, RewardArray]:
    """Values ``[all turns of the step]`` cut up again, in the order of the groups."""
    members = list(_members(groups))
    ends = np.cumsum([len(_turns(member)) for member in members])
    parts = np.split(values, ends[:-1])
    return {m.trajectory.id: part for m, part in zip(members, parts, strict=True)}


_Method = Callable[
    [Sequence[ScoredGroup], AlgorithmSection, float, frozenset[RowKey]],
    dict[TrajectoryId, RewardArray],
]
_METHODS: dict[str, _Method] = {
    "grpo": _grpo,
    "rloo": _rloo,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
    "gigpo": _gigpo,
}
