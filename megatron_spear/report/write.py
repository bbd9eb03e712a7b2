"""Writes a report: run directories in, one HTML file out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_spear.errors import ConfigError
from megatron_spear.files import replacing
from megatron_spear.report.arms import Arm, arms_of
from megatron_spear.report.bands import band_of
from megatron_spear.report.charts import Chart, charts_for
from megatron_spear.report.figures import final_figures, series_in
from megatron_spear.report.keeping import Kept, StepReader, keep
from megatron_spear.report.page import pack_data, page_parts, program_text, style_sheet
from megatron_spear.report.runs import Run, read_run
from megatron_spear.tracking.summary import summary_rows

MAX_BYTES = 50_000_000
"""Size of a report unless the caller says another."""

_MAX_TITLE = 100
_FRAME_BYTES = 20_000
_DATA_BLOCK_BYTES = 100  # around a chunk's base64
_PLACE_BYTES = 6  # of a row: where its turns are


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What was written, and whether all its runs have ended."""

    path: Path
    num_bytes: int
    num_trajectories: int
    notes: tuple[str, ...]
    ended: bool


class ReportWriter:
    """Writes the report of some runs, again as often as is wished.

    Args:
        paths: run directories.
        out: the file; another one of that name is replaced.
        groups: arms by name, beside those that settings tell (``arms``).
        max_bytes: the file is not to be larger; trajectories give way.
        reload_s: the page loads itself anew so often until its runs have ended; 0 = never.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        out: Path,
        *,
        groups: Mapping[str, Sequence[Path]] | None = None,
        max_bytes: int = MAX_BYTES,
        reload_s: float = 0.0,
    ) -> None:
        self._groups = dict(groups or {})
        given = [*paths, *(path for group in self._groups.values() for path in group)]
        self._paths = list({path.resolve(): path for path in given}.values())
        self._out, self._max_bytes, self._reload_s = out, max_bytes, reload_s
        self._steps = StepReader(max_bytes)

    def write(self) -> Written:
        """Read the runs and write the file, whole or not at all.

        Raises ConfigError for a path that is no run directory, and where even the curves do not fit
        into ``max_bytes``; OSError for a file that cannot be written.
        """
        runs = [read_run(path) for path in self._paths]
        ended = all(run.ended for run in runs)
        data = self._data(runs, 0.0 if ended else self._reload_s)
        kept = self._kept(runs, len(pack_data(data)) * 4 / 3)
        notes = kept.notes + _damage_notes(self._steps.damaged)
        listing = {
            "trajectories": kept.listing.trajectories,
            "replayed": kept.listing.replayed,
            "steps": kept.steps,
            "notes": notes,
        }
        with replacing(self._out) as file:
            for part in page_parts(data["title"], data, listing, kept.chunks):
                file.write(part.encode("utf-8"))
            num_bytes = file.tell()
        return Written(
            path=self._out,
            num_bytes=num_bytes,
            num_trajectories=len(kept.listing.trajectories.get("step", ())),
            notes=notes,
            ended=ended,
        )

    def _data(self, runs: Sequence[Run], reload_s: float) -> dict[str, Any]:
        names = {name for run in runs for name in run.metrics}
        charts = charts_for(names)
        arms = arms_of(runs, self._groups) if len(runs) > 1 else ()
        shown = names if len(runs) == 1 else {m for c in charts for m, _ in c.series}
        return {
            "title": _title(runs, arms),
            "written": time.time(),
            "reload_s": reload_s,
            "runs": [_run(run, shown) for run in runs],
            "charts": [asdict(chart) for chart in charts],
            "arms": [_arm(runs, arm, charts) for arm in arms],
            "figures": [asdict(figure) for figure in final_figures(runs, arms)] if arms else [],
        }

    def _kept(self, runs: Sequence[Run], data_bytes: float) -> Kept:
        steps = self._steps.read(runs)
        program = len(program_text()) + len(style_sheet()) + _FRAME_BYTES
        rows = keep(steps, 0.0).listing
        rows_bytes = len(pack_data([rows.trajectories, rows.replayed])) * 4 / 3
        rows_bytes += _PLACE_BYTES * len(rows.trajectories.get("step", ()))
        blocks = _DATA_BLOCK_BYTES * len(steps)
        left = self._max_bytes - program - data_bytes - rows_bytes - blocks
        if left < 0:
            raise ConfigError(
                f"{self._out}: curves and list alone take "
                f"{(self._max_bytes - left) / 1e6:.1f} MB, the limit is "
                f"{self._max_bytes / 1e6:.1f} MB; raise --max-mb or give fewer runs"
            )
        return keep(steps, left)


def _run(run: Run, metrics: set[str]) -> dict[str, Any]:
    return {
        "name": run.name,
        "title": run.title,
        "seed": run.seed,
        "ended": run.ended,
        "last_step": run.last_step,
        "planned_steps": run.planned_steps,
        "last_time": run.last_time,
        "facts": _facts(run),
        "summary": summary_rows(run.summary),
        "metrics": {name: series for name, series in run.metrics.items() if name in metrics},
    }


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was trained on what, in a few settings."""
    found = []
    for label, path in (
        ("environment", "env.type"),
        ("model", "model.path"),
        ("advantage", "algorithm.advantage"),
        ("self-imitation", "replay.enabled"),
        ("history", "env.history"),
        ("seed", "run.seed"),
    ):
        value: Any = run.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            found.append((label, _words(value)))
    return found


def _words(value: Any) -> str:
    """A setting for the reader: on, off, ``window 2`` for ``{window: 2}``."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    return str(value)


def _arm(runs: Sequence[Run], arm: Arm, charts: Sequence[Chart]) -> dict[str, Any]:
    bands = {}
    for metric in dict.fromkeys(metric for chart in charts for metric, _ in chart.series):
        series = series_in(runs, arm, metric)
        if series:
            band = band_of(series)
            bands[metric] = {
                "n": len(series),
                "steps": band.steps,
                "mean": [interval.mean for interval in band.intervals],
                "low": [interval.low for interval in band.intervals],
                "high": [interval.high for interval in band.intervals],
            }
    differing = [(path, str(value)) for path, value in arm.differing.items()]
    return {"name": arm.name, "runs": arm.runs, "differing": differing, "bands": bands}


def _title(runs: Sequence[Run], arms: Sequence[Arm]) -> str:
    if len(runs) == 1:
        return (
            runs[0].title if runs[0].title == runs[0].name else f"{runs[0].title}: {runs[0].name}"
        )
    names = " / ".join(dict.fromkeys(run.title for run in runs))
    return f"{names[:_MAX_TITLE]}: {len(arms)} arms, {len(runs)} runs"


def _damage_notes(damaged: Sequence[str]) -> tuple[str, ...]:
    if not damaged:
        return ()
    return (f"Recorded trajectories that could not be read: {'; '.join(damaged)}.",)
