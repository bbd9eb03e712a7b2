"""Replay as the official code has it (``algorithm.compat: official``), saved with checkpoints.

The buffer of ``replay.official`` decides; the tokens of its rows lie in the replay store. Rows keep
the score they had at collection (defect 15), a release clears the buffer (defect 10).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.replay.official import (
    OfficialRelease,
    OfficialReplayBuffer,
    OfficialReplayRules,
    OfficialRows,
    keyed_permutation,
)
from megatron_spear.replay.released import ReleasedRow
from megatron_spear.replay.selection import recalibrated
from megatron_spear.replay.state import require_keys
from megatron_spear.replay.store import ReplayStore
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.types import (
    Origin,
    StepContext,
    StepReport,
    TrainSample,
    TrajectoryId,
    Update,
)


class OfficialReplayHook(Hook):
    """At most one replay ``Update`` a step, when the buffer is full.

    Samples are rows of ``official.rows``: one segment each, with its own reward.
    """

    def __init__(
        self, replay: ReplaySection, algorithm: AlgorithmSection, group_size: int, folder: Path
    ) -> None:
        self._buffer = OfficialReplayBuffer(
            OfficialReplayRules(
                tree=algorithm.official.tree,
                capacity=replay.capacity,
                max_history_groups=replay.baseline_history,
                tolerate_steps=replay.max_age,
                group_size=group_size,
                weight_decay=replay.decay if replay.baseline == "decay" else -1.0,
                normalize_std=algorithm.normalize_std,
                min_released_rows=algorithm.official.min_released_rows,
            )
        )
        self._store = ReplayStore(folder, capacity=None)  # the buffer decides what stays
        self._pending: list[TrainSample] = []
        self._released: tuple[ReleasedRow, ...] = ()
        self._entered: frozenset[TrajectoryId] = frozenset()
        self._metrics: dict[str, float] = {}

    def on_samples(self, ctx: StepContext, samples: Sequence[TrainSample]) -> None:
        """Remember all rows of the step: they make the history, the good ones are inserted."""
        self._pending = list(samples)

    def extra_updates(self, ctx: StepContext) -> list[Update]:
        """The buffer's release, if it is full; the buffer and its rows are gone after that."""
        weight = ctx.coefficients.replay_weight
        stored = len(self._buffer)
        self._released = ()
        self._metrics = {"replay/weight": weight, "replay/rows": 0.0}
        release = self._buffer.take(keyed_permutation(ctx.seed, ctx.step))
        updates: list[Update] = []
        if release is not None:
            samples = self._samples(release, weight)
            self._metrics |= {
                "replay/rows": float(len(samples)),
                "replay/p50": release.baseline,
                "replay/kept_fraction": release.num_kept / max(release.num_stored, 1),
            }
            updates.append(Update(samples=samples, origin=Origin.REPLAY, weight=weight))
        if stored and not len(self._buffer):
            self._store.discard(self._store.index().row_ids)
        self._metrics["replay/stored"] = float(len(self._buffer))
        return updates

    def metrics(self) -> dict[str, float]:
        """``replay/*`` of the current step."""
        return dict(self._metrics)

    def on_step_end(self, ctx: StepContext, report: StepReport) -> None:
        """Evict, update the history, insert: in this order, after the optimizer steps."""
        rows, self._pending = self._pending, []
        self._entered = frozenset()
        if not rows:
            return
        good = [bool((row.advantages > 0).any()) for row in rows]
        first = self._store.next_row
        self._store.add([[row] for row, is_good in zip(rows, good, strict=True) if is_good])
        ids = np.where(good, first - 1 + np.cumsum(good), -1)
        weight = ctx.coefficients.intrinsic_weight
        self._buffer.add(
            ctx.step,
            OfficialRows(
                row_ids=ids,
                uid=np.array([row.trajectory_id.group for row in rows]),
                traj_uid=np.array([str(row.trajectory_id) for row in rows]),
                rewards=np.array([row.reward.total(weight) for row in rows]),
                has_tool_call=np.array([row.tool_calls > 0 for row in rows]),
                mask=np.array([[float(row.response_mask.any())] for row in rows]),
                advantages=np.array([[float(row.advantages.max(initial=0.0))] for row in rows]),
            ),
        )
        self._store.discard(np.setdiff1d(self._store.index().row_ids, self._buffer.row_ids))
        inside = np.isin(ids, self._buffer.row_ids)
        self._entered = frozenset(
            row.trajectory_id for row, is_in in zip(rows, inside, strict=True) if is_in
        )

    @property
    def released(self) -> tuple[ReleasedRow, ...]:
        """The rows of the last step's update."""
        return self._released

    @property
    def entered(self) -> frozenset[TrajectoryId]:
        """The trajectories of which the last step inserted a row."""
        return self._entered

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the store's position."""
        return {"buffer": self._buffer.state_dict(), "store": self._store.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; CheckpointError on other keys or damaged store files."""
        require_keys(state, ("buffer", "store"), type(self).__name__)
        self._buffer.load_state_dict(state["buffer"])
        self._store.load_state_dict(state["store"])
        self._pending, self._metrics = [], {}

    def prune(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Delete the store's files that no kept checkpoint and no live row needs."""
        self._store.prune([state["store"] for state in kept])

    def _samples(self, release: OfficialRelease, weight: float) -> tuple[TrainSample, ...]:
        taken = self._store.take(release.rows.row_ids.tolist())
        advantages = release.advantages[:, 0].tolist()
        self._released = tuple(
            ReleasedRow(
                stored=tuple(samples),
                advantage=advantage,
                baseline=None if self._buffer.decays else release.baseline,
                reward=reward,
                weight=weight,
            )
            for samples, advantage, reward in zip(
                taken, advantages, release.rows.rewards.tolist(), strict=True
            )
        )
        return tuple(
            sample
            for samples, advantage in zip(taken, advantages, strict=True)
            for sample in recalibrated(samples, advantage)
        )
