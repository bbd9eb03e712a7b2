"""``curves.png``: the curves of a run, drawn from ``metrics.jsonl``.

Panels whose metrics a run does not have are left out; names are those of the trainer's step report.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.metrics import is_metric, phases
from megatron_spear.tracking.jsonl import read_metrics
from megatron_spear.tracking.series import Array, Records, series

PANEL_SUCCESS = "eval/success"
ROLLOUT_SUCCESS = "rollout/success"
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """One panel: metric names with their legends; ``right`` ones have an axis of their own."""

    title: str
    left: tuple[tuple[str, str], ...]
    right: tuple[tuple[str, str], ...] = ()
    left_label: str = ""
    right_label: str = ""


_CURVES = (
    Curves(
        title="Reward",
        left=(
            ("reward/mean", "total"),
            ("reward/outcome", "outcome"),
            ("reward/intrinsic", "intrinsic (before mu)"),
            ("reward/format", "format"),
        ),
    ),
    Curves(
        title="Policy entropy and drift",
        left=(("policy/entropy", "entropy"),),
        right=(("policy/kl", "KL"), ("policy/clip_fraction", "clipped share")),
        left_label="nats",
    ),
    Curves(
        title="Self-imitation replay",
        left=(("replay/rows", "rows replayed"), ("replay/inserted", "rows inserted")),
        right=(("replay/age_mean", "mean age"),),
        left_label="trajectories",
        right_label="policy versions",
    ),
    Curves(
        title="Curriculum",
        left=(
            ("curriculum/replay_weight", "replay weight (gamma)"),
            ("curriculum/intrinsic_weight", "intrinsic weight (mu)"),
        ),
    ),
    Curves(
        title="Games",
        left=(("rollout/turns_mean", "turns"),),
        right=(
            ("rollout/valid_fraction", "valid actions"),
            ("rollout/truncated_fraction", "truncated"),
        ),
        left_label="turns",
        right_label="share",
    ),
    Curves(
        title="Optimizer",
        left=(("optimizer/grad_norm", "gradient norm"),),
        right=(("optimizer/lr", "learning rate"),),
    ),
)


def plot_curves(metrics: Path, picture: Path, *, title: str = "") -> Path:
    """Draw the curves of ``metrics`` (a ``metrics.jsonl``) into ``picture`` (PNG); returns it.

    Needs no display. A file without any step gives a picture that says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(metrics) if metrics.is_file() else []
    draws = _draws(records)
    rows = max(1, -(-len(draws) // 2))
    figure = Figure(figsize=(12, 3.6 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=14, fontweight="bold")
    if not draws:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center")
    for index, draw in enumerate(draws):
        axes = figure.add_subplot(rows, 2, index + 1)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top"]].set_visible(False)
        axes.xaxis.set_major_locator(
            MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        )
        draw(axes)
    figure.savefig(picture)
    return picture


def moving_average(values: Array, window: int) -> Array:
    """Mean of the last ``window`` values at each place, of fewer at the start; same length. Missing
    ones (NaN) are left out; NaN where all are missing.

    Example: ``moving_average([1, 2, 3, 4], 2)`` is ``[1, 1.5, 2.5, 3.5]``.
    """
    missing = np.isnan(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(missing, 0.0, values))])
    count = np.concatenate([[0], np.cumsum(~missing)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    there = count[ends] - count[starts]
    means: Array = (total[ends] - total[starts]) / np.where(there > 0, there, np.nan)
    return means


def _draws(records: Records) -> list[Callable[[Any], None]]:
    """One drawing function a panel that has something to show."""
    draws: list[Callable[[Any], None]] = []
    if any(_has(records, name) for name in (PANEL_SUCCESS, ROLLOUT_SUCCESS)):
        draws.append(partial(_draw_success, records))
    for curves in _CURVES:
        if any(_has(records, name) for name, _ in curves.left + curves.right):
            draws.append(partial(_draw_curves, records, curves))
    timed = phases(name for record in records for name in record)
    if timed:
        draws.append(partial(_draw_phases, records, timed))
    return draws


def _draw_success(records: Records, axes: Any) -> None:
    steps, values = series(records, ROLLOUT_SUCCESS)
    if len(steps):
        window = max(2, min(10, len(steps) // 4))
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps, values, color=_COLOURS[0], marker=marker, alpha=0.3, label="training games"
        )
        axes.plot(
            steps,
            moving_average(values, window),
            color=_COLOURS[0],
            linewidth=2,
            label=f"training games, mean of {window} steps",
        )
    panel_steps, panel = series(records, PANEL_SUCCESS)
    if len(panel):
        axes.plot(
            panel_steps, panel, "o--", color=_COLOURS[1], markersize=7, label="panel (fixed games)"
        )
        for step, value in ((panel_steps[0], panel[0]), (panel_steps[-1], panel[-1])):
            axes.annotate(
                f"{value:.2f}",
                (step, value),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                color=_COLOURS[1],
                fontweight="bold",
            )
    highest = max([*values, *panel])
    axes.set_ylim(0.0, min(1.05, max(0.1, highest * 1.25 + 0.02)))
    axes.margins(x=0.06)
    axes.set_title("Success")
    _legend(axes, *axes.get_legend_handles_labels())


def _draw_curves(records: Records, curves: Curves, axes: Any) -> None:
    colours = iter(_COLOURS)
    lines = _lines(axes, records, curves.left, colours, "-")
    axes.set_ylabel(curves.left_label)
    if any(_has(records, name) for name, _ in curves.right):
        other = axes.twinx()
        lines += _lines(other, records, curves.right, colours, "--")
        other.set_ylabel(curves.right_label)
        other.spines[["top"]].set_visible(False)
        other.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    axes.set_title(curves.title)
    _legend(axes, lines, [line.get_label() for line in lines])


def _lines(
    axes: Any, records: Records, names: tuple[tuple[str, str], ...], colours: Any, style: str
) -> list[Any]:
    lines = []
    suffix = " (right)" if style == "--" else ""
    for name, label in names:
        steps, values = series(records, name)
        if len(steps) and (np.any(values) or len(names) == 1):
            marker = "o" if len(steps) == 1 else None
            lines += axes.plot(
                steps, values, style, marker=marker, color=next(colours), label=label + suffix
            )
    return lines


def _draw_phases(records: Records, timed: list[str], axes: Any) -> None:
    """Seconds of each phase, stacked; small ones together as ``other``."""
    with_time = [r for r in records if any(f"time/{p}_s" in r for p in timed)]
    steps = [r["step"] for r in with_time]
    table = np.array([[_number(r, f"time/{p}_s") for r in with_time] for p in timed])
    order = np.argsort(-table.sum(axis=1))
    shown, rest = order[:5], order[5:]
    names = [timed[i].replace("_", " ") for i in shown]
    heights = [table[i] for i in shown]
    if len(rest):
        names.append("other")
        heights.append(table[rest].sum(axis=0))
    if len(steps) == 1:
        axes.barh(names, [height[0] for height in heights], color=_COLOURS[: len(names)])
        axes.set_xlabel("s")
        axes.invert_yaxis()
    else:
        axes.stackplot(steps, heights, labels=names, colors=_COLOURS, alpha=0.85)
        axes.set_xlim(min(steps), max(steps))
        handles, labels = axes.get_legend_handles_labels()
        _legend(axes, handles, labels)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("s per step")
    axes.set_title("Time by phase")


def _legend(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """The legend below the panel, where it hides no curve."""
    if handles:
        axes.legend(
            handles,
            labels,
            fontsize=8,
            frameon=False,
            ncol=3,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.17),
        )


def _has(records: Records, name: str) -> bool:
    return any(is_metric(name, record.get(name)) for record in records)


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    return float(value) if value is not None and is_metric(name, value) else 0.0
