"""Differences between arms with intervals, at equal amounts of work.

Seeds are drawn first, then games of the panel, both with replacement: a difference that hangs on
one lucky seed has a wide interval, as one that hangs on few games has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from outcome import Array, Outcome

RESAMPLES = 10_000
_SEED = 20260101

Amount = Callable[[Outcome], Array]
"""[E] work done up to each evaluation: trainer steps, environment steps, trained tokens."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over seeds and games."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def signed(self) -> str:
        """With the signs of a difference."""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def trainer_steps(outcome: Outcome) -> Array:
    """[E] trainer steps."""
    return np.array([evaluation.step for evaluation in outcome.evaluations], dtype=np.float64)


def won_at(outcome: Outcome, amount: Amount, at: float) -> Array:
    """[G] share won of each game after ``at`` work, between two evaluations in proportion.

    Example: a game lost at 100 environment steps and won at 200 counts 0.5 at 150.
    """
    work, won = amount(outcome), outcome.won
    assert work[0] <= at <= work[-1] + 1e-9, "nobody may be judged beyond the end of its run"
    after = min(int(np.searchsorted(work, at)), len(work) - 1)
    before = max(0, after - 1)
    span = work[after] - work[before]
    share = (at - work[before]) / span if span else 1.0
    if share >= 1.0:
        return np.asarray(won[after])
    mixed: Array = (1.0 - share) * won[before] + share * won[after]
    return mixed


def common_amount(outcomes: Sequence[Outcome], amount: Amount) -> float:
    """The most work that all runs have done."""
    return float(min(amount(outcome)[-1] for outcome in outcomes))


def table_at(outcomes: Sequence[Outcome], amount: Amount, at: float) -> Array:
    """[S, G] of an arm's seeds, in the order of the seeds."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.seed)
    return np.stack([won_at(outcome, amount, at) for outcome in ordered])


def table_over(outcomes: Sequence[Outcome]) -> Array:
    """[S, G] of an arm's seeds, in the order of the seeds: each game's mean over all evaluations
    but that of the warm start; NaN where it has none."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.seed)
    won = np.stack([outcome.won[1:] for outcome in ordered])  # [S, E, G]
    counts = (~np.isnan(won)).sum(axis=1)
    means: Array = np.where(counts, np.nansum(won, axis=1) / np.maximum(counts, 1), np.nan)
    return means


def estimate(table: Array) -> Estimate:
    """Of one value a seed and game, [S, G]; NaN (all attempts failed) is left out."""
    rng = np.random.default_rng(_SEED)
    seeds, games = table.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = table[rng.integers(seeds, size=seeds)]
        means[i] = np.nanmean(rows[:, rng.integers(games, size=games)])
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(value=float(np.nanmean(table)), low=float(low), high=float(high))


def in_pairs(
    arm: Sequence[Outcome], reference: Sequence[Outcome]
) -> tuple[list[Outcome], list[Outcome]]:
    """The runs of the seeds that both arms have."""
    seeds = {run.seed for run in arm} & {run.seed for run in reference}
    return [run for run in arm if run.seed in seeds], [r for r in reference if r.seed in seeds]


def difference(arm: Array, reference: Array) -> Estimate:
    """Of two arms' tables [S, G] of the same seeds and games, paired."""
    assert arm.shape == reference.shape, f"{arm.shape} against {reference.shape}: not in pairs"
    return estimate(arm - reference)
