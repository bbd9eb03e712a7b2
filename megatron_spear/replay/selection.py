"""Which stored trajectories are replayed in a step, and with what advantage (SPEAR Eq. 1-4).

    advantage   reward minus baseline (``replay.baseline``: p50, batch_mean, per_prompt), over a
                spread where new advantages are, one number for all sampled tokens; or the stored
                advantages (decay, none)
    kept        advantage > 0 and age <= ``replay.max_age``
    released    a uniform draw of the kept rows, once each unless ``replay.reuse``: at most
                ``replay.rows_per_step`` each step (continuous), or ``replay.capacity`` at once when
                there are enough (burst)

All of it works on columns: nothing here costs Python time by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.draws import raw_draws, stream_draws
from megatron_spear.config.method import ReplaySection
from megatron_spear.replay.index import IntArray, ReplayIndex, RewardColumn
from megatron_spear.types import StepContext, TrainSample

FULL_FACTOR = 1.5
"""A burst takes more kept rows than this multiple of the capacity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The rows to take ``[K]``, in the store's order, each with its advantage, and metrics."""

    row_ids: IntArray
    advantages: RewardColumn
    metrics: dict[str, float]


def stored_scale(section: ReplaySection) -> float | None:
    """What stored advantages are multiplied by; None where rewards are compared anew.

    ``none`` leaves them as they are (vanilla self-imitation, Eq. 1). ``decay`` multiplies once by a
    constant, whatever a row's age, as the official code's Mode B does.
    """
    return {"none": 1.0, "decay": section.decay}.get(section.baseline)


def select(
    index: ReplayIndex, advantages: RewardColumn, ctx: StepContext, section: ReplaySection
) -> Selection:
    """Keep what is good and young enough, and draw from it.

    ``advantages`` ``[N]`` are those at replay; a row is kept where its own is positive (so never
    where it is not a number) and its age, ``ctx.policy_version`` minus its version, is at most
    ``max_age``. The draw is without replacement and keyed by (seed, step, trajectory): it depends
    neither on the order of the rows, nor on other rows, nor on earlier draws.

    Example: rewards 1, 1, 0 with baseline 0.5 keep the first two at advantage 0.5; with
    rows_per_step 1 one of these is drawn.
    """
    ages = ctx.policy_version - index.policy_versions
    young = ages <= section.max_age
    kept = np.flatnonzero(young & (advantages > 0.0))
    limit = _release_size(len(kept), section)
    chosen = np.sort(kept[_drawn(index.pick(kept), ctx, limit)])
    metrics = {
        "replay/num_candidates": float(young.sum()),
        "replay/rows": float(len(chosen)),
    }
    if young.any():
        metrics["replay/kept_fraction"] = len(kept) / int(young.sum())
    if len(chosen):
        metrics["replay/age_mean"] = float(ages[chosen].mean())
        metrics["replay/age_max"] = float(ages[chosen].max())
        metrics["replay/advantage_mean"] = float(advantages[chosen].mean())
    return Selection(row_ids=index.row_ids[chosen], advantages=advantages[chosen], metrics=metrics)


def recalibrated(samples: Sequence[TrainSample], advantage: float) -> list[TrainSample]:
    """The samples with ``advantage`` on every masked token; old_logprobs stay those stored.

    What turns differed by at collection (GiGPO's step part, format penalties) is gone: the stored
    comparison is replaced by another.
    """
    return [
        replace(
            sample,
            advantages=np.where(sample.response_mask, advantage, 0.0).astype(np.float32),
        )
        for sample in samples
    ]


def scaled(samples: Sequence[TrainSample], scale: float) -> list[TrainSample]:
    """The samples with their stored advantages, token by token, times ``scale``."""
    return [replace(s, advantages=s.advantages * np.float32(scale)) for s in samples]


def _release_size(num_kept: int, section: ReplaySection) -> int:
    """The most rows to draw.

    Example: a burst at capacity 8 takes nothing of 12 kept rows, and 8 of 13.
    """
    if section.release == "continuous":
        return section.rows_per_step
    return section.capacity if num_kept > FULL_FACTOR * section.capacity else 0


def _drawn(rows: ReplayIndex, ctx: StepContext, count: int) -> npt.NDArray[np.intp]:
    """Positions of the ``count`` rows with the smallest draws; all of fewer rows.

    A row's draw is a 64-bit mix of its trajectory's key and a key of (seed, step); the smaller row
    id decides between equal ones.
    """
    if count >= len(rows):
        return np.arange(len(rows))
    if count == 0:
        return np.zeros(0, np.intp)
    step_key = raw_draws(1, ctx.seed, ctx.step, "replay")
    draws = stream_draws(rows.trajectory_keys, np.repeat(step_key, len(rows)))
    bound = np.partition(draws, count - 1)[count - 1]
    few = np.flatnonzero(draws <= bound)
    order = np.lexsort((rows.row_ids[few], draws[few]))
    chosen: npt.NDArray[np.intp] = few[order[:count]]
    return chosen
