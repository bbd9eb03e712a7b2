"""Chosen metrics of one or several runs in one picture: a panel a metric, a line a run."""

import difflib
import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_spear.errors import ConfigError, DataError
from megatron_spear.files import make_folder_of
from megatron_spear.metrics import is_metric
from megatron_spear.tracking.jsonl import METRICS_FILE, read_metrics
from megatron_spear.tracking.plot import moving_average
from megatron_spear.tracking.series import Array, Records, series

DEFAULT_METRICS = (
    "eval/success",
    "rollout/success",
    "reward/mean",
    "policy/entropy",
    "policy/kl",
    "replay/rows",
    "rollout/turns_mean",
    "optimizer/grad_norm",
    "time/step_s",
)
"""What is drawn where none is chosen, of those that a run has."""

_ENDINGS = (".png", ".svg", ".pdf")
_MAX_PANELS = 40
_MAX_NAME = 40


def read_runs(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Records by the run's name; runs may still go on.

    A name is the folder's, with as much of the path before it as tells the runs apart. Raises
    DataError for a path without metrics, or given twice.
    """
    folders = [path.resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise DataError("a run is given twice; name each once")
    runs: dict[str, list[dict[str, Any]]] = {}
    for path, folder in zip(paths, folders, strict=True):
        file = folder / METRICS_FILE
        if not file.is_file():
            raise DataError(
                f"{path}: no {METRICS_FILE}; expected the directory of a run that has begun"
            )
        runs[_name_of(folder, folders)] = read_metrics(file)
    return runs


def metric_names(runs: Mapping[str, Records]) -> list[str]:
    """Every metric that a run has a number of, sorted."""
    found = {
        name
        for records in runs.values()
        for record in records
        for name, value in record.items()
        if is_metric(name, value)
    }
    return sorted(found)


def choose_metrics(runs: Mapping[str, Records], patterns: Sequence[str]) -> list[str]:
    """The metrics that the patterns (``replay/*``, ``policy/kl``) name, in their order; by default
    ``DEFAULT_METRICS``.

    Raises ConfigError for a pattern without any, with the nearest names, and for more panels than a
    picture takes.
    """
    known = metric_names(runs)
    if not patterns:
        chosen = [name for name in DEFAULT_METRICS if name in known]
        if not chosen:
            raise ConfigError(
                f"none of the default metrics is there; choose with --metrics of: {_some(known)}"
            )
        return chosen
    chosen = []
    for pattern in patterns:
        own = fnmatch.filter(known, pattern)
        if not own:
            near = difflib.get_close_matches(pattern, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {_some(known)}"
            raise ConfigError(f"no run has a metric {pattern!r}; {hint} (--list names all)")
        chosen += [name for name in own if name not in chosen]
    if len(chosen) > _MAX_PANELS:
        raise ConfigError(
            f"{len(chosen)} metrics chosen, expected at most {_MAX_PANELS} in one picture; narrow "
            "the patterns"
        )
    return chosen


def plot_runs(
    runs: Mapping[str, Records], metrics: Sequence[str], picture: Path, *, smooth: int = 1
) -> None:
    """Draw ``metrics`` into ``picture``, by its ending a PNG, SVG or PDF.

    With ``smooth`` above 1 each line is the mean of the last so many values, the values themselves
    faint behind it. Raises ConfigError for an ending that cannot be drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows + 0.5), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    if picture.suffix not in _ENDINGS:
        raise ConfigError(f"--out {picture}: expected a name that ends in .png, .svg or .pdf")
    for number, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.set_title(metric, fontsize=11)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for colour, (name, records) in enumerate(runs.items()):
            _draw(axes, *series(records, metric), f"C{colour % 10}", _shown(name), smooth)
    if len(runs) > 1:
        handles = _handles(runs)
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    make_folder_of(picture)
    figure.savefig(picture)


def table_of(runs: Mapping[str, Records], metrics: Sequence[str]) -> list[str]:
    """A line a run and metric: how many values, first, last, least and largest."""
    width = max(len(metric) for metric in metrics)
    head = f"{'metric':{width}} {'values':>7} {'first':>10} {'last':>10} {'min':>10} {'max':>10}"
    lines = []
    for name, records in runs.items():
        lines += [f"{name} (step {max((r['step'] for r in records), default=0)})", head]
        for metric in metrics:
            _, values = series(records, metric)
            shown = (values[0], values[-1], values.min(), values.max()) if len(values) else ()
            cells = "".join(f" {value:>10.4g}" for value in shown)
            lines.append(f"{metric:{width}} {len(values):>7}{cells}")
    return lines


def dump_series(runs: Mapping[str, Records], metrics: Sequence[str], path: Path) -> None:
    """Write what is drawn as JSON: ``{run: {metric: [[step, value], ...]}}``."""
    drawn = {
        name: {metric: np.stack(series(records, metric), axis=1).tolist() for metric in metrics}
        for name, records in runs.items()
    }
    make_folder_of(path)
    path.write_text(json.dumps(drawn) + "\n", encoding="utf-8")


def _draw(axes: Any, steps: Array, values: Array, colour: str, name: str, smooth: int) -> None:
    if not len(steps):
        return
    marker = "o" if len(steps) == 1 else None
    if smooth > 1 and len(steps) > 1:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        values = moving_average(values, smooth)
    axes.plot(steps, values, color=colour, marker=marker, label=name, linewidth=1.8)


def _handles(runs: Mapping[str, Records]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=f"C{number % 10}", label=_shown(name))
        for number, name in enumerate(runs)
    ]


def _name_of(folder: Path, folders: Sequence[Path]) -> str:
    """The end of a path that no other of the paths has."""
    for length in range(1, len(folder.parts)):
        own = folder.parts[-length:]
        if sum(other.parts[-length:] == own for other in folders) == 1:
            return "/".join(own)
    return str(folder)


def _shown(name: str) -> str:
    """Matplotlib leaves out labels that begin with _, and takes $ for mathematics."""
    name = name.lstrip("_").replace("$", r"\$") or "run"
    return name if len(name) <= _MAX_NAME else "..." + name[-_MAX_NAME:]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
