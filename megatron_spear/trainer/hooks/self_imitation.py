"""SPEAR's self-imitation: good trajectories of earlier steps are trained on again (Eq. 2-5).

Equation numbers are those of the SPEAR paper (arXiv 2509.22601). Order inside one step: the
baseline learns this step's groups, then rows of *earlier* steps are released, and only at the end
this step's own rows are inserted and old ones evicted.

| metric ``replay/...`` | what |
|---|---|
| ``stored``, ``num_candidates`` | rows after the release; rows young enough before it |
| ``rows``, ``num_releases`` | rows replayed in this step; steps so far that replayed some |
| ``kept_fraction`` | share of the candidates with a positive advantage |
| ``p50``, ``weight`` | median of the recorded group means; gamma(t) |
| ``spread_p50`` | median of the groups' spreads, where advantages are divided by spreads |
| ``baseline_mean``, ``num_compared_with_p50`` | see ``replay.baseline`` |
| ``age_mean``, ``age_max``, ``advantage_mean``, ``tool_calls_mean`` | of what is replayed |
| ``inserted``, ``cleared`` | rows that enter at the end of this step; rows a burst forgets |
| ``evicted_by_age``, ``evicted_by_capacity`` | rows that left at the end of the *last* step |

What comes from the loss (``replay/ratio_mean``, ``clip_fraction``, ``zero_gradient_fraction``,
``cov_dropped_fraction``, ...) is added by ``algorithms.policy_loss`` and ``trainer.mini_batches``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.algorithms.group_baselines import STD_EPSILON
from megatron_spear.config.method import ReplaySection
from megatron_spear.replay.baseline import (
    BaselineHistory,
    baseline_spreads,
    baseline_values,
    batch_mean,
    batch_spread,
)
from megatron_spear.replay.index import ReplayIndex, RewardColumn
from megatron_spear.replay.released import ReleasedRow
from megatron_spear.replay.selection import Selection, recalibrated, scaled, select, stored_scale
from megatron_spear.replay.state import require_keys
from megatron_spear.replay.store import ReplayStore
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.types import (
    Origin,
    ScoredGroup,
    StepContext,
    StepReport,
    TrainSample,
    TrajectoryId,
    Update,
)


class SelfImitationHook(Hook):
    """Keeps the replay store and its baseline; adds at most one replay ``Update`` a step.

    ``folder`` holds the store's files. ``divide`` says that the advantages of new trajectories are
    divided by their group's spread (``replay.spread``): recalibrated ones are divided then too, or
    they would be of another size. ``section.enabled`` is the builder's to read: no hook, no replay.
    Draws are keyed by the context's seed and step. Between bursts (``release: burst``) the
    store is bounded by age alone. Covariance clipping is not done here: it needs current log-probs,
    which the loop has (``algorithms.covariance``).
    """

    def __init__(self, section: ReplaySection, folder: Path, *, divide: bool = False) -> None:
        self._section = section
        self._divide = divide
        bursts = section.release == "burst"
        self._store = ReplayStore(folder, None if bursts else section.capacity)
        self._history = BaselineHistory(section.baseline_history)
        self._groups: tuple[ScoredGroup, ...] = ()
        self._admitted: frozenset[TrajectoryId] = frozenset()
        self._pending: list[list[TrainSample]] = []
        self._released: tuple[ReleasedRow, ...] = ()
        self._entered: frozenset[TrajectoryId] = frozenset()
        self._metrics: dict[str, float] = {}
        self._step_mean: float | None = None
        self._step_spread: float | None = None
        self._num_releases = 0
        self._evicted_by_age = 0
        self._evicted_by_capacity = 0
        self._inside_step = False

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        """Learn the groups' means and spreads and which trajectories may enter the store.

        With dynamic sampling once a round: groups that are replaced later count like all others, or
        the baseline would be that of the hard prompts.
        """
        if not self._inside_step:
            self._begin(ctx)
        weight = ctx.coefficients.intrinsic_weight
        self._history.extend(ctx.step, groups)
        self._groups += groups
        self._step_mean = batch_mean(self._groups, weight)
        self._step_spread = batch_spread(self._groups, weight)
        self._admitted |= {
            member.trajectory.id
            for group in groups
            for member in group.members
            if not self._section.require_valid_action
            or any(turn.valid for turn in member.trajectory.turns)
        }
        if len(self._history):
            self._metrics["replay/p50"] = self._history.p50(weight)
        if self._divide and not math.isnan(spread := self._history.spread_p50(weight)):
            self._metrics["replay/spread_p50"] = spread
        return groups

    def on_samples(self, ctx: StepContext, samples: Sequence[TrainSample]) -> None:
        """Remember the admitted trajectories that did better than their group (advantage > 0).

        Rows without a response mask (those the row filters marked) are left out of them.
        """
        self._pending = [
            [row for row in rows if row.response_mask.any()]
            for rows in _by_trajectory(samples)
            if rows[0].trajectory_id in self._admitted
            and _mean_advantage(rows) > 0.0
            and (not self._section.require_tool_call or _num_tool_calls(rows) > 0)
        ]
        self._metrics["replay/inserted"] = float(len(self._pending))

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        """One update of good rows of earlier steps, weighted with gamma(t); or none.

        With gamma = 0 nothing is released, so no row is spent without effect.
        """
        updates: list[Update] = []
        self._released = ()
        weight = ctx.coefficients.replay_weight
        if weight > 0.0:
            samples = self._release(ctx)
            if samples:
                self._num_releases += 1
                updates.append(Update(samples=samples, origin=Origin.REPLAY, weight=weight))
        else:
            self._metrics["replay/rows"] = 0.0
        self._metrics["replay/num_releases"] = float(self._num_releases)
        self._metrics["replay/stored"] = float(len(self._store))
        return updates

    def metrics(self) -> dict[str, float]:
        """``replay/*`` of the current step."""
        return dict(self._metrics)

    def on_step_end(self, ctx: StepContext, report: StepReport) -> None:
        """Insert this step's rows; evict beyond capacity and beyond the age limit."""
        self._evicted_by_capacity = self._store.add(self._pending)
        oldest = report.policy_version - self._section.max_age
        self._evicted_by_age = self._store.evict_older_than(oldest)
        self._entered = frozenset(rows[0].trajectory_id for rows in self._pending)
        self._groups, self._pending = (), []
        self._inside_step = False

    @property
    def released(self) -> tuple[ReleasedRow, ...]:
        """The rows of the last step's update."""
        return self._released

    @property
    def entered(self) -> frozenset[TrajectoryId]:
        """The trajectories that the last step inserted."""
        return self._entered

    def state_dict(self) -> dict[str, Any]:
        """The store's position, the baseline's entries and what was counted; only between steps."""
        assert not self._inside_step, "state is saved between steps, after every hook's on_step_end"
        return {
            "store": self._store.state_dict(),
            "baseline": self._history.state_dict(),
            "num_releases": self._num_releases,
            "evicted_by_age": self._evicted_by_age,
            "evicted_by_capacity": self._evicted_by_capacity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; CheckpointError on other keys or damaged store files."""
        counts = ("num_releases", "evicted_by_age", "evicted_by_capacity")
        require_keys(state, ("store", "baseline", *counts), type(self).__name__)
        self._store.load_state_dict(state["store"])
        self._history.load_state_dict(state["baseline"])
        self._num_releases, self._evicted_by_age, self._evicted_by_capacity = (
            state[name] for name in counts
        )
        self._groups, self._admitted, self._pending, self._metrics = (), frozenset(), [], {}
        self._inside_step = False

    def prune(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Delete the store's files that no kept checkpoint and no live row needs."""
        self._store.prune([state["store"] for state in kept])

    def _begin(self, ctx: StepContext) -> None:
        self._inside_step = True
        self._groups, self._admitted, self._pending = (), frozenset(), []
        self._metrics = {
            "replay/weight": ctx.coefficients.replay_weight,
            "replay/evicted_by_age": float(self._evicted_by_age),
            "replay/evicted_by_capacity": float(self._evicted_by_capacity),
        }

    def _release(self, ctx: StepContext) -> tuple[TrainSample, ...]:
        """The step's draw, taken out of the store unless it may be drawn again; a burst clears what
        it leaves."""
        index, scale = self._store.index(), stored_scale(self._section)
        baselines: RewardColumn | None = None
        if scale is None:
            baselines, advantages = self._compared(index, ctx.coefficients.intrinsic_weight)
        else:
            advantages = scale * index.advantages
        selection = select(index, advantages, ctx, self._section)
        self._metrics |= selection.metrics
        if not len(selection.row_ids):
            return ()
        get = self._store.read if self._section.reuse else self._store.take
        taken = get(selection.row_ids)
        calls = [_num_tool_calls(samples) for samples in taken]
        self._metrics["replay/tool_calls_mean"] = float(np.mean(calls))
        if self._section.release == "burst":
            cleared = self._store.discard(self._store.index().row_ids)
            self._metrics["replay/cleared"] = float(cleared)
        compared = list(zip(taken, selection.advantages.tolist(), strict=True))
        against = [None] * len(taken) if baselines is None else _picked(index, selection, baselines)
        self._released = tuple(
            _released(ctx, samples, advantage, baseline)
            for (samples, advantage), baseline in zip(compared, against, strict=True)
        )
        return tuple(
            sample
            for samples, advantage in compared
            for sample in (
                recalibrated(samples, advantage) if scale is None else scaled(samples, scale)
            )
        )

    def _compared(
        self, index: ReplayIndex, intrinsic_weight: float
    ) -> tuple[RewardColumn, RewardColumn]:
        """float64 ``[N]`` each: the baselines, and rewards minus these, over the spread where new
        advantages are."""
        kind, weight = self._section.baseline, intrinsic_weight
        baselines, metrics = baseline_values(
            kind, index, self._history, step_mean=self._step_mean, intrinsic_weight=weight
        )
        self._metrics |= metrics
        advantages = index.rewards(weight) - baselines
        if self._divide:
            advantages /= STD_EPSILON + baseline_spreads(
                kind, index, self._history, step_spread=self._step_spread, intrinsic_weight=weight
            )
        return baselines, advantages


def _picked(index: ReplayIndex, selection: Selection, baselines: RewardColumn) -> list[float]:
    """The baselines of the selected rows; the index is in the order of row ids."""
    picked: list[float] = baselines[np.searchsorted(index.row_ids, selection.row_ids)].tolist()
    return picked


def _released(
    ctx: StepContext, samples: Sequence[TrainSample], advantage: float, baseline: float | None
) -> ReleasedRow:
    """The row with what it was compared with, if its reward was compared anew."""
    return ReleasedRow(
        stored=tuple(samples),
        advantage=advantage,
        baseline=baseline,
        reward=samples[0].reward.total(ctx.coefficients.intrinsic_weight),
        weight=ctx.coefficients.replay_weight,
    )


def _by_trajectory(samples: Iterable[TrainSample]) -> list[list[TrainSample]]:
    """The samples as whole trajectories, in order of trajectory id and segment."""
    ordered = sorted(
        samples, key=lambda s: (s.trajectory_id.group, s.trajectory_id.member, s.segment)
    )
    result = [list(rows) for _, rows in groupby(ordered, key=lambda s: s.trajectory_id)]
    for rows in result:
        assert len(rows) == rows[0].num_segments, f"segments of {rows[0].trajectory_id} are missing"
    return result


def _mean_advantage(rows: Sequence[TrainSample]) -> float:
    """Mean advantage over the trajectory's masked tokens; 0 where there are none."""
    values = np.concatenate([row.advantages[row.response_mask] for row in rows])
    return float(values.mean()) if len(values) else 0.0


def _num_tool_calls(rows: Iterable[TrainSample]) -> int:
    return sum(row.tool_calls for row in rows)
