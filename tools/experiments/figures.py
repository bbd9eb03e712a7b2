"""Pictures of an experiment: an arm a colour and dashes, the mean over seeds and its 95 % band."""

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
_COLOURS, _DASHES = 10, ("-", "--", ":")
_BAND_FROM = 3  # that of two seeds is 13 standard errors


def draw(arms: Arms, titles: Mapping[str, str], picture: Path, title: str) -> None:
    """The panel's success over three measures of work, and how the policy explores.

    ``titles`` are those of all arms of the experiment, so that each looks alike in every picture.
    """
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
    for name, runs in arms.items():
        work = [amount(run) for run in runs]
        at = np.linspace(0.0, min(w[-1] for w in work), _POINTS)
        success = [np.nanmean(run.won, axis=1) for run in runs]
        curves = np.stack([np.interp(at, w, s) for w, s in zip(work, success, strict=True)])
        label = f"{titles[name]} ({len(runs)})"
        _draw_band(axes, at, curves, list(titles).index(name), label, top=1.0)


def _draw_metric(axes: Any, arms: Arms, titles: Mapping[str, str], metric: str) -> None:
    for name, runs in arms.items():
        series = [np.array(run.steps[metric], dtype=np.float64) for run in runs]
        curves = np.stack([moving_average(s, _SMOOTH) for s in series])
        at = np.arange(1, curves.shape[1] + 1)
        _draw_band(axes, at, curves, list(titles).index(name), titles[name])


def _draw_band(
    axes: Any, at: Array, curves: Array, index: int, label: str, top: float | None = None
) -> None:
    """Mean of [S, X] curves and its 95 % interval, as the report has them; within 0 and ``top``."""
    colour, dashes = f"C{index % _COLOURS}", _DASHES[index // _COLOURS % len(_DASHES)]
    intervals = [interval_of(values) for values in curves.T.tolist()]
    means = [interval.mean for interval in intervals]
    axes.plot(at, means, color=colour, linestyle=dashes, label=label)
    if len(curves) >= _BAND_FROM:
        low, high = (
            np.clip([getattr(i, side) for i in intervals], 0.0, top) for side in ("low", "high")
        )
        axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
