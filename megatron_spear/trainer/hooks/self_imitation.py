"""SPEAR's self-imitation: good trajectories of earlier steps are trained on once more (Eq. 2-5).

Equation numbers are those of the SPEAR paper (arXiv 2509.22601). Order inside one step: the
baseline learns this step's groups, then rows of *earlier* steps are released, and only at the end
this step's own rows are inserted.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.config.method import ReplaySection
from megatron_spear.replay.baseline import BaselineHistory
from megatron_spear.replay.selection import baseline_values, recalibrated, select
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

    ``folder`` holds the store's files. ``section.enabled`` is the builder's to read: no hook, no
    replay. Draws are keyed by the context's seed and step. Covariance clipping is not done here: it
    needs current log-probs, which the loop has (``algorithms.covariance``).
    """

    def __init__(self, section: ReplaySection, folder: Path) -> None:
        self._section = section
        self._store = ReplayStore(folder, section.capacity)
        self._history = BaselineHistory(section.baseline_history)
        self._admitted: frozenset[TrajectoryId] = frozenset()
        self._pending: list[list[TrainSample]] = []
        self._metrics: dict[str, float] = {}
        self._inside_step = False

    def on_scored(
        self, ctx: StepContext, groups: tuple[ScoredGroup, ...]
    ) -> tuple[ScoredGroup, ...]:
        """Learn this step's group means and which trajectories may enter the store."""
        self._inside_step = True
        self._history.extend(ctx.step, groups)
        self._admitted = frozenset(
            member.trajectory.id
            for group in groups
            for member in group.members
            if not self._section.require_valid_action
            or any(turn.valid for turn in member.trajectory.turns)
        )
        self._pending = []
        self._metrics = {"replay/weight": ctx.coefficients.replay_weight}
        if len(self._history):
            self._metrics["replay/p50"] = self._history.p50(ctx.coefficients.intrinsic_weight)
        return groups

    def on_samples(self, ctx: StepContext, samples: Sequence[TrainSample]) -> None:
        """Remember the admitted trajectories that did better than their group (advantage > 0).

        Rows without a response mask (those the row filters marked) are left out of them.
        """
        self._pending = [
            [row for row in rows if row.response_mask.any()]
            for rows in _by_trajectory(samples)
            if rows[0].trajectory_id in self._admitted and _mean_advantage(rows) > 0.0
        ]
        self._metrics["replay/inserted"] = float(len(self._pending))

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        """One update of recalibrated rows of earlier steps, weighted with gamma(t); or none.

        With gamma = 0 nothing is released, so no row is spent without effect.
        """
        updates: list[Update] = []
        weight = ctx.coefficients.replay_weight
        if weight > 0.0:
            samples = self._release(ctx)
            if samples:
                updates.append(Update(samples=samples, origin=Origin.REPLAY, weight=weight))
        else:
            self._metrics["replay/rows"] = 0.0
        self._metrics["replay/stored"] = float(len(self._store))
        return updates

    def metrics(self) -> dict[str, float]:
        """``replay/*`` of the current step; ``replay/stored`` counts the rows after the release."""
        return dict(self._metrics)

    def on_step_end(self, ctx: StepContext, report: StepReport) -> None:
        """Insert this step's rows; evict beyond capacity and beyond the age limit."""
        self._store.add(self._pending)
        self._store.evict_older_than(report.policy_version - self._section.max_age)
        self._pending = []
        self._inside_step = False

    def state_dict(self) -> dict[str, Any]:
        """The store's position and the baseline's entries; only between steps."""
        assert not self._inside_step, "state is saved between steps, after every hook's on_step_end"
        return {"store": self._store.state_dict(), "baseline": self._history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; CheckpointError on other keys or damaged store files."""
        require_keys(state, ("store", "baseline"), type(self).__name__)
        self._store.load_state_dict(state["store"])
        self._history.load_state_dict(state["baseline"])
        self._admitted, self._pending, self._metrics = frozenset(), [], {}
        self._inside_step = False

    def prune(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Delete the store's files that no kept checkpoint and no live row needs."""
        self._store.prune([state["store"] for state in kept])

    def _release(self, ctx: StepContext) -> tuple[TrainSample, ...]:
        rows = self._store.candidates()
        baselines = baseline_values(
            self._section.baseline, self._history, rows, ctx.coefficients.intrinsic_weight
        )
        selection = select(
            rows,
            baselines,
            ctx,
            max_age=self._section.max_age,
            max_rows=self._section.rows_per_step,
        )
        self._metrics.update(selection.metrics)
        taken = self._store.take(selection.row_ids)
        return tuple(
            sample
            for samples, advantage in zip(taken, selection.advantages, strict=True)
            for sample in recalibrated(samples, advantage)
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
