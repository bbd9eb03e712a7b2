"""Pictures of an experiment: an arm a colour, the mean over seeds and its 95 % band."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from estimates import Amount, trainer_steps
from outcome import Array, Outcome

from megatron_spear.report.bands import interval_of
from megatron_spear.tracking.plot import moving_average

Arms = Mapping[str, Sequence[Outcome]]

_SMOOTH = 5
_POINTS = 60


def draw(arms: Arms, titles: Mapping[str, str], picture: Path, title: str) -> None:
    """The panel's success over three measures of work, and how the policy explores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes = figure.subplots(2, 3)
    for column, (amount, label) in enumerate(
        (
            (trainer_steps, "trainer steps"),
            (lambda run: run.environment_steps / 1e3, "environment steps, thousands"),
            (lambda run: run.trained_tokens / 1e6, "trained tokens, millions"),
        )
    ):
        _draw_panel(axes[0][column], arms, titles, amount)
        axes[0][column].set(title="Success on the panel", xlabel=label)
    for column, (name, label) in enumerate(
        (
            ("policy/entropy", "Entropy of the policy, nats"),
            ("rollout/turns_mean", "Turns a trajectory"),
            ("rollout/tool_calls_mean", "Tool calls a trajectory"),
        )
    ):
        _draw_metric(axes[1][column], arms, titles, name)
        axes[1][column].set(title=f"{label} (mean of {_SMOOTH} steps)", xlabel="trainer step")
    for each in axes.flat:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def _draw_panel(axes: Any, arms: Arms, titles: Mapping[str, str], amount: Amount) -> None:
    for index, (name, runs) in enumerate(arms.items()):
        work = [amount(run) for run in runs]
        at = np.linspace(0.0, min(w[-1] for w in work), _POINTS)
        success = [np.nanmean(run.won, axis=1) for run in runs]
        curves = np.stack([np.interp(at, w, s) for w, s in zip(work, success, strict=True)])
        _draw_band(axes, at, curves, f"C{index}", f"{titles[name]} ({len(runs)})")


def _draw_metric(axes: Any, arms: Arms, titles: Mapping[str, str], metric: str) -> None:
    for index, (name, runs) in enumerate(arms.items()):
        series = [np.array(run.steps[metric], dtype=np.float64) for run in runs]
        curves = np.stack([moving_average(np.nan_to_num(s), _SMOOTH) for s in series])
        _draw_band(axes, np.arange(1, curves.shape[1] + 1), curves, f"C{index}", titles[name])


def _draw_band(axes: Any, at: Array, curves: Array, colour: str, label: str) -> None:
    """Mean of [S, X] curves and its 95 % interval, as the report has them."""
    intervals = [interval_of(values) for values in curves.T.tolist()]
    axes.plot(at, [interval.mean for interval in intervals], color=colour, label=label)
    if len(curves) > 1:
        low, high = ([getattr(i, side) for i in intervals] for side in ("low", "high"))
        axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
