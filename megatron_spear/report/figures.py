"""The last figures of each arm, with intervals over its runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_spear.report.arms import Arm
from megatron_spear.report.bands import Interval, interval_of
from megatron_spear.report.charts import ROLLOUT_RATE, TRAIN_RATE
from megatron_spear.report.runs import Run, Series

LAST_STEPS = 5
"""Steps that a figure of training is the mean of."""

_PANEL = (("eval/success", "panel success"), ("eval/failed", "panel attempts failed"))
_TRAINING = (
    ("rollout/success", "training success"),
    ("reward/mean", "reward"),
    ("reward/outcome", "outcome reward"),
    ("policy/entropy", "entropy, nats"),
    ("policy/kl", "drift, nats"),
    ("rollout/turns_mean", "turns"),
    ("rollout/tool_calls_mean", "tool calls"),
    ("replay/rows", "replayed rows"),
    ("replay/age_mean", "their age"),
    (ROLLOUT_RATE, "sampled tokens/s"),
    (TRAIN_RATE, "trained tokens/s"),
    ("time/step_s", "s a step"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One row: a figure of each arm (None where no run has it), and how it was taken."""

    name: str
    taken: str
    arms: tuple[Interval | None, ...]


def final_figures(runs: Sequence[Run], arms: Sequence[Arm]) -> tuple[Figure, ...]:
    """The figures that some run has.

    A panel's is that of the last evaluation and its best; one of training is the mean of the last
    ``LAST_STEPS`` steps.
    """
    last = f"mean of the last {LAST_STEPS} steps"
    rows = [_figure(runs, arms, "steps done", "", None)]
    for metric, name in _PANEL:
        rows.append(_figure(runs, arms, name, "last evaluation", metric))
    rows.append(_figure(runs, arms, "panel success, best", "best evaluation", "eval/success", max))
    rows += [_figure(runs, arms, name, last, metric, _mean_of_last) for metric, name in _TRAINING]
    return tuple(row for row in rows if any(row.arms))


def _figure(
    runs: Sequence[Run],
    arms: Sequence[Arm],
    name: str,
    taken: str,
    metric: str | None,
    take: Callable[[Sequence[float]], float] = lambda values: values[-1],
) -> Figure:
    found = []
    for arm in arms:
        values = [
            float(runs[r].last_step) if metric is None else float(take(runs[r].metrics[metric][1]))
            for r in arm.runs
            if metric is None or metric in runs[r].metrics
        ]
        found.append(interval_of(values) if values else None)
    return Figure(name=name, taken=taken, arms=tuple(found))


def _mean_of_last(values: Sequence[float]) -> float:
    last = values[-LAST_STEPS:]
    return sum(last) / len(last)


def series_in(runs: Sequence[Run], arm: Arm, metric: str) -> list[Series]:
    """The metric's series in those runs of an arm that have it."""
    return [runs[r].metrics[metric] for r in arm.runs if metric in runs[r].metrics]
