"""What replayed rewards are compared with: the history of group means (SPEAR's D_R, Eq. 2) and the
baselines made of it.

| ``replay.baseline`` | a row's reward is compared with |
|---|---|
| ``p50`` | the median of the recorded group means |
| ``batch_mean`` | the mean reward of this step's trajectories |
| ``per_prompt`` | the mean of the group means recorded for its own prompt |

Everything is weighed with the present intrinsic weight. A row for which there is no such number is
compared with the median: one whose prompt has left the history (``per_prompt``), all of them in a
step in which every rollout failed (``batch_mean``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.errors import DataError
from megatron_spear.replay.index import ReplayIndex, RewardColumn, key_of
from megatron_spear.replay.state import require_keys
from megatron_spear.types import ScoredGroup

_PARTS = ("outcome", "intrinsic", "format")
_COLUMNS = ("step", "prompt_key", *_PARTS)
_MEANS = np.dtype(list(zip(_COLUMNS, ("<i8", "<u8", "<f8", "<f8", "<f8"), strict=True)))


class BaselineHistory:
    """The last ``max_groups`` group means, the oldest leaving first.

    Means are kept in parts because mu(t) decays: the official code stores shaped rewards, so old
    groups look better than later ones of equal outcome and the comparison is biased.

    Example: groups with (outcome, intrinsic) means (1, 0), (0, 0.4), (0, 0) have P50 0 at mu = 0
    and 0.4 at mu = 1.
    """

    def __init__(self, max_groups: int) -> None:
        self._max_groups = max_groups
        self._means = np.zeros(0, _MEANS)

    def __len__(self) -> int:
        return len(self._means)

    def extend(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Append one entry for each group with members; each member counts once.

        DataError, with nothing appended, where a reward is not finite: such a number would make
        every later comparison meaningless.
        """
        rows = [_row(step, group) for group in groups if group.members]
        self._means = np.concatenate([self._means, np.array(rows, _MEANS)])[-self._max_groups :]

    def p50(self, intrinsic_weight: float) -> float:
        """Median of the group means at the current intrinsic weight (linear interpolation)."""
        assert len(self), "the history is updated with the step's groups before it is read"
        return float(np.percentile(self._totals(intrinsic_weight), 50))

    def prompt_means(
        self, intrinsic_weight: float
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
        """Keys of the recorded prompts, ascending, and the mean of each one's group means."""
        keys, first, inverse, counts = np.unique(
            self._means["prompt_key"], return_index=True, return_inverse=True, return_counts=True
        )
        totals = self._totals(intrinsic_weight)
        base = totals[first]  # as in _mean
        deviations = np.bincount(inverse, totals - base[inverse], minlength=len(keys))
        return keys, base + deviations / counts

    def state_dict(self) -> dict[str, Any]:
        """The entries as columns, oldest first (plain JSON)."""
        return {name: self._means[name].tolist() for name in _COLUMNS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all entries; CheckpointError on other keys."""
        require_keys(state, _COLUMNS, "replay baseline")
        rows = list(zip(*(state[name] for name in _COLUMNS), strict=True))
        self._means = np.array(rows, _MEANS)[-self._max_groups :]

    def _totals(self, intrinsic_weight: float) -> RewardColumn:
        means = self._means
        totals: RewardColumn = (
            means["outcome"] + intrinsic_weight * means["intrinsic"] + means["format"]
        )
        return totals


def batch_mean(groups: Sequence[ScoredGroup], intrinsic_weight: float) -> float | None:
    """Mean reward of all trajectories of a step, each counted once; None where there are none."""
    members = [member for group in groups for member in group.members]
    return _mean([m.reward.total(intrinsic_weight) for m in members]) if members else None


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


def _batch_mean(
    index: ReplayIndex, history: BaselineHistory, step_mean: float | None, intrinsic_weight: float
) -> RewardColumn:
    return np.full(len(index), np.nan if step_mean is None else step_mean)


def _per_prompt(
    index: ReplayIndex, history: BaselineHistory, step_mean: float | None, intrinsic_weight: float
) -> RewardColumn:
    keys, means = history.prompt_means(intrinsic_weight)
    place = np.minimum(np.searchsorted(keys, index.prompt_keys), len(keys) - 1)
    return np.where(keys[place] == index.prompt_keys, means[place], np.nan)


_Own = Callable[[ReplayIndex, BaselineHistory, float | None, float], RewardColumn]
_OWN: dict[str, _Own] = {"batch_mean": _batch_mean, "per_prompt": _per_prompt}
"""Baselines other than P50; NaN on rows that have none of their own."""


def _row(step: int, group: ScoredGroup) -> tuple[float, ...]:
    rewards = [member.reward for member in group.members]
    means = [_mean([getattr(reward, part) for reward in rewards]) for part in _PARTS]
    if not np.isfinite(means).all():
        raise DataError(
            f"group {group.group_id} of prompt {group.prompt.prompt_id}: got rewards with the mean "
            f"{dict(zip(_PARTS, means, strict=True))}, expected finite numbers; mend what scores "
            "this task, or let it fail (a failed trajectory is left out)"
        )
    return step, key_of(group.prompt.prompt_id), *means


def _mean(values: Sequence[float]) -> float:
    """The mean, exact where all values are equal: a reward must not beat its equals by a rounding
    (0.1 + 0.1 + ... is not a multiple of 0.1)."""
    return values[0] + sum(value - values[0] for value in values) / len(values)
