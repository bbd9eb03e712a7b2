"""Which stored trajectories are replayed in a step, and with what advantage (SPEAR Eq. 2-4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_spear.algorithms.draws import raw_draws
from megatron_spear.replay.baseline import BaselineHistory
from megatron_spear.replay.store import ReplayRow
from megatron_spear.types import StepContext, TrainSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The rows to take, in the store's order, each with its recalibrated advantage, and metrics."""

    row_ids: tuple[int, ...]
    advantages: tuple[float, ...]
    metrics: dict[str, float]


def baseline_values(
    kind: str, history: BaselineHistory, rows: Sequence[ReplayRow], intrinsic_weight: float
) -> list[float]:
    """What each row's reward is compared with; ``p50`` is the same number for all rows."""
    return _BASELINES[kind](history, rows, intrinsic_weight)


def select(
    rows: Sequence[ReplayRow],
    baselines: Sequence[float],
    ctx: StepContext,
    *,
    max_age: int,
    max_rows: int,
) -> Selection:
    """Recalibrate, keep what is still good and young enough, and draw at most ``max_rows``.

    A row's advantage is its reward at the *current* intrinsic weight minus its baseline; it is kept
    when this is positive and its age, ``ctx.policy_version`` minus its own version, is at most
    ``max_age``. The draw is without replacement and keyed by (seed, step, trajectory), so it
    depends neither on the order of the rows nor on earlier draws.

    Example: rewards 1, 1, 0 with baseline 0.5 keep the first two at advantage 0.5; with max_rows 1
    one of these is drawn.
    """
    weight = ctx.coefficients.intrinsic_weight
    advantages = [
        row.reward.total(weight) - value for row, value in zip(rows, baselines, strict=True)
    ]
    ages = [ctx.policy_version - row.policy_version for row in rows]
    young = [i for i in range(len(rows)) if ages[i] <= max_age]
    kept = [i for i in young if advantages[i] > 0.0]
    chosen = sorted(sorted(kept, key=lambda i: _draw(rows[i], ctx))[:max_rows])
    metrics = {
        "replay/num_candidates": float(len(young)),
        "replay/rows": float(len(chosen)),
    }
    if young:
        metrics["replay/kept_fraction"] = len(kept) / len(young)
    if chosen:
        metrics["replay/age_mean"] = float(np.mean([ages[i] for i in chosen]))
        metrics["replay/advantage_mean"] = float(np.mean([advantages[i] for i in chosen]))
    return Selection(
        row_ids=tuple(rows[i].row_id for i in chosen),
        advantages=tuple(advantages[i] for i in chosen),
        metrics=metrics,
    )


def recalibrated(samples: Sequence[TrainSample], advantage: float) -> list[TrainSample]:
    """The samples with ``advantage`` on every masked token; old_logprobs stay those stored."""
    return [
        replace(
            sample,
            advantages=np.where(sample.response_mask, advantage, 0.0).astype(np.float32),
        )
        for sample in samples
    ]


def _draw(row: ReplayRow, ctx: StepContext) -> tuple[int, int]:
    draw = raw_draws(1, ctx.seed, ctx.step, "replay", str(row.trajectory_id))
    return int(draw[0]), row.row_id


def _p50(
    history: BaselineHistory, rows: Sequence[ReplayRow], intrinsic_weight: float
) -> list[float]:
    return [history.p50(intrinsic_weight)] * len(rows) if rows else []


_Baseline = Callable[[BaselineHistory, Sequence[ReplayRow], float], list[float]]
_BASELINES: dict[str, _Baseline] = {"p50": _p50}
