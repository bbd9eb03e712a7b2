"""What replayed rewards are compared with: the history of group means (SPEAR's D_R, Eq. 2) and the
baselines made of it; and what the difference is divided by where new advantages are divided too.

| ``replay.baseline`` | a row's reward is compared with | and divided by the |
|---|---|---|
| ``p50`` | the median of the recorded group means | median of the groups' spreads |
| ``batch_mean`` | the mean reward of this step's trajectories | spread of these |
| ``per_prompt`` | the mean of the group means recorded for its own prompt | mean of their spreads |

A spread is a standard deviation; groups of equal rewards have none and do not count, as no new
advantage is divided by theirs. Everything is weighed with the present intrinsic weight. A row for
which there is no such number gets that of ``p50``: one whose prompt has left the history
(``per_prompt``), all of them in a step in which every rollout failed (``batch_mean``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.errors import DataError
from megatron_spear.replay.index import ReplayIndex, RewardColumn, key_of
from megatron_spear.replay.spread import SPREAD_PARTS, spread_at, spread_parts
from megatron_spear.replay.state import require_keys
from megatron_spear.types import ScoredGroup

_PARTS = ("outcome", "intrinsic", "format")
_NUMBERS = (*_PARTS, *SPREAD_PARTS)
_COLUMNS = ("step", "prompt_key", *_NUMBERS)
_ENTRY = np.dtype([("step", "<i8"), ("prompt_key", "<u8"), *((name, "<f8") for name in _NUMBERS)])

_Column = npt.NDArray[np.float64]


class BaselineHistory:
    """The last ``max_groups`` group means and spreads, the oldest leaving first.

    They are kept in parts because mu(t) decays: the official code stores shaped rewards, so old
    groups look better than later ones of equal outcome and the comparison is biased.

    Example: groups with (outcome, intrinsic) means (1, 0), (0, 0.4), (0, 0) have P50 0 at mu = 0
    and 0.4 at mu = 1.
    """

    def __init__(self, max_groups: int) -> None:
        self._max_groups = max_groups
        self._entries = np.zeros(0, _ENTRY)

    def __len__(self) -> int:
        return len(self._entries)

    def extend(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Append one entry for each group with members; each member counts once.

        DataError, with nothing appended, where a reward is not finite: such a number would make
        every later comparison meaningless.
        """
        rows = [_row(step, group) for group in groups if group.members]
        entries = np.concatenate([self._entries, np.array(rows, _ENTRY)])
        self._entries = entries[-self._max_groups :]

    def p50(self, intrinsic_weight: float) -> float:
        """Median of the group means at the current intrinsic weight (linear interpolation)."""
        assert len(self), "the history is updated with the step's groups before it is read"
        return float(np.percentile(self._totals(intrinsic_weight), 50))

    def spread_p50(self, intrinsic_weight: float) -> float:
        """Median of the spreads above 0 at the current intrinsic weight; NaN if there are none."""
        spreads = self._spreads(intrinsic_weight)
        spreads = spreads[spreads > 0.0]
        return float(np.percentile(spreads, 50)) if len(spreads) else math.nan

    def prompt_means(self, intrinsic_weight: float, prompt_keys: npt.NDArray[np.uint64]) -> _Column:
        """float64 ``[N]``: the mean of the group means of each of these prompts, NaN where none is
        recorded."""
        totals = self._totals(intrinsic_weight)
        return _means_by_key(self._entries["prompt_key"], totals, prompt_keys)

    def prompt_spreads(
        self, intrinsic_weight: float, prompt_keys: npt.NDArray[np.uint64]
    ) -> _Column:
        """float64 ``[N]``: the mean of each prompt's spreads above 0, NaN where there is none."""
        spreads = self._spreads(intrinsic_weight)
        spread = spreads > 0.0
        return _means_by_key(self._entries["prompt_key"][spread], spreads[spread], prompt_keys)

    def state_dict(self) -> dict[str, Any]:
        """The entries as columns, oldest first (plain JSON)."""
        return {name: self._entries[name].tolist() for name in _COLUMNS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all entries; CheckpointError on other keys."""
        require_keys(state, _COLUMNS, "replay baseline")
        rows = list(zip(*(state[name] for name in _COLUMNS), strict=True))
        self._entries = np.array(rows, _ENTRY)[-self._max_groups :]

    def _totals(self, intrinsic_weight: float) -> RewardColumn:
        means = self._entries
        totals: RewardColumn = (
            means["outcome"] + intrinsic_weight * means["intrinsic"] + means["format"]
        )
        return totals

    def _spreads(self, intrinsic_weight: float) -> _Column:
        return spread_at({name: self._entries[name] for name in SPREAD_PARTS}, intrinsic_weight)


def batch_mean(groups: Sequence[ScoredGroup], intrinsic_weight: float) -> float | None:
    """Mean reward of all trajectories of a step, each counted once; None where there are none."""
    members = [member for group in groups for member in group.members]
    return _mean([m.reward.total(intrinsic_weight) for m in members]) if members else None


def batch_spread(groups: Sequence[ScoredGroup], intrinsic_weight: float) -> float | None:
    """Standard deviation of the rewards of all trajectories of a step; None where they are equal or
    there are none."""
    members = [member for group in groups for member in group.members]
    if not members:
        return None
    parts = dict(zip(SPREAD_PARTS, spread_parts(members), strict=True))
    return float(spread_at(parts, intrinsic_weight)) or None


def baseline_values(
    kind: str,
    index: ReplayIndex,
    history: BaselineHistory,
    *,
    step_mean: float | None,
    intrinsic_weight: float,
) -> tuple[RewardColumn, dict[str, float]]:
    """float64 ``[N]``: what each row's reward is compared with, and metrics.

    ``step_mean`` is this step's ``batch_mean``. Where rows can differ from P50 the metrics tell
    their mean and how many rows had to be compared with it.

    Example: history a: 1, 0 and b: 0.25 has P50 0.25; ``per_prompt`` compares rows of the prompts
    a, b and c with 0.5, 0.25 and (c is not recorded) 0.25.
    """
    if not len(index):
        return np.zeros(0), {}
    p50 = history.p50(intrinsic_weight)
    if kind == "p50":
        return np.full(len(index), p50), {}
    own = _OWN[kind](index, history, step_mean, intrinsic_weight)
    unknown = np.isnan(own)
    values = np.where(unknown, p50, own)
    return values, {
        "replay/baseline_mean": float(values.mean()),
        "replay/num_compared_with_p50": float(unknown.sum()),
    }


def baseline_spreads(
    kind: str,
    index: ReplayIndex,
    history: BaselineHistory,
    *,
    step_spread: float | None,
    intrinsic_weight: float,
) -> RewardColumn:
    """float64 ``[N]``: what each row's reward minus its baseline is divided by, above 0.

    ``step_spread`` is this step's ``batch_spread``. NaN where nothing recorded has a spread: then
    no advantage of the step was divided by anything either, and there is no scale to go by.

    Example: group a of rewards 1, 0 and group b of 0.5, 0.5: a row of b is divided by 0.707 with
    ``p50``, and with ``per_prompt`` too, as its own group has no spread.
    """
    p50 = history.spread_p50(intrinsic_weight)
    if kind == "p50":
        return np.full(len(index), p50)
    if kind == "batch_mean":
        return np.full(len(index), p50 if step_spread is None else step_spread)
    own = history.prompt_spreads(intrinsic_weight, index.prompt_keys)
    return np.where(np.isnan(own), p50, own)


def _batch_mean(
    index: ReplayIndex, history: BaselineHistory, step_mean: float | None, intrinsic_weight: float
) -> RewardColumn:
    return np.full(len(index), np.nan if step_mean is None else step_mean)


def _per_prompt(
    index: ReplayIndex, history: BaselineHistory, step_mean: float | None, intrinsic_weight: float
) -> RewardColumn:
    return history.prompt_means(intrinsic_weight, index.prompt_keys)


_Own = Callable[[ReplayIndex, BaselineHistory, float | None, float], RewardColumn]
_OWN: dict[str, _Own] = {"batch_mean": _batch_mean, "per_prompt": _per_prompt}
"""Baselines other than P50; NaN on rows that have none of their own."""


def _means_by_key(
    keys: npt.NDArray[np.uint64], values: _Column, wanted: npt.NDArray[np.uint64]
) -> _Column:
    """The mean of the values of each wanted key; NaN for a key that has none."""
    if not len(keys):
        return np.full(len(wanted), np.nan)
    known, first, inverse, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    base = values[first]  # as in _mean
    deviations = np.bincount(inverse, values - base[inverse], minlength=len(known))
    means = base + deviations / counts
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, means[place], np.nan)


def _row(step: int, group: ScoredGroup) -> tuple[float, ...]:
    rewards = [member.reward for member in group.members]
    means = [_mean([getattr(reward, part) for reward in rewards]) for part in _PARTS]
    if not np.isfinite(means).all():
        raise DataError(
            f"group {group.group_id} of prompt {group.prompt.prompt_id}: got rewards with the mean "
            f"{dict(zip(_PARTS, means, strict=True))}, expected finite numbers; mend what scores "
            "this task, or let it fail (a failed trajectory is left out)"
        )
    return step, key_of(group.prompt.prompt_id), *means, *spread_parts(group.members)


def _mean(values: Sequence[float]) -> float:
    """The mean, exact where all values are equal: a reward must not beat its equals by a rounding
    (0.1 + 0.1 + ... is not a multiple of 0.1)."""
    return values[0] + sum(value - values[0] for value in values) / len(values)
