"""What a report reads of a run directory, a run that is still going or was killed included."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_spear.config.load import CONFIG_NAME
from megatron_spear.errors import ConfigError
from megatron_spear.metrics import is_metric, is_number, speeds
from megatron_spear.report.charts import ROLLOUT_RATE, STEP_RATE, TRAIN_RATE
from megatron_spear.tracking.jsonl import METRICS_FILE, read_metrics
from megatron_spear.tracking.recorded_files import FOLDER

Series = tuple[tuple[int, ...], tuple[float, ...]]
"""Steps and values, of the same length."""

_SUMMARY = "summary.json"
_RATES = {"rollout": ROLLOUT_RATE, "train": TRAIN_RATE, "step": STEP_RATE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run as it is on disk now.

    ``settings`` are those of ``config.yaml`` and ``summary`` is ``summary.json``: {} where there is
    none yet. ``last_time`` is when the last record was written (seconds since 1970).
    """

    path: Path
    settings: Mapping[str, Any]
    metrics: Mapping[str, Series]
    summary: Mapping[str, Any]
    last_step: int
    last_time: float | None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.path.resolve().name

    @property
    def title(self) -> str:
        """``run.name``, or the folder's name."""
        return str(_of_run(self.settings, "name") or self.name)

    @property
    def seed(self) -> int | None:
        """``run.seed``."""
        seed = _of_run(self.settings, "seed")
        return seed if isinstance(seed, int) else None

    @property
    def planned_steps(self) -> int | None:
        """``run.steps``."""
        steps = _of_run(self.settings, "steps")
        return steps if isinstance(steps, int) else None

    @property
    def ended(self) -> bool:
        """Whether its summary is there."""
        return bool(self.summary)

    @property
    def trajectories(self) -> Path:
        """The folder of its recorded trajectories, there or not."""
        return self.path / FOLDER


def read_run(path: Path) -> Run:
    """Read a run directory.

    Raises ConfigError for what is none. A line or a summary that is half-written counts as not
    there, so a run that is still going reads as it was a moment ago.
    """
    metrics, config = path / METRICS_FILE, path / CONFIG_NAME
    if not metrics.is_file() and not config.is_file():
        raise ConfigError(
            f"{path}: holds neither {CONFIG_NAME} nor {METRICS_FILE}; expected a run directory "
            "(run.dir of a training)"
        )
    records = read_metrics(metrics) if metrics.is_file() else []
    times = [record["time"] for record in records if is_number(record.get("time"))]
    return Run(
        path=path,
        settings=_mapping(config, yaml.safe_load),
        metrics=series_of(records),
        summary=_mapping(path / _SUMMARY, json.loads),
        last_step=records[-1]["step"] if records else 0,
        last_time=max(times, default=None),
    )


def series_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Each metric's steps and numbers, and the rates that two of them make. A value that is not
    finite counts as not there.

    Example: ``[{"step": 1, "a": 2.0}, {"step": 2, "a": None}]`` gives ``{"a": ((1,), (2.0,))}``.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        values = {**record, **_rates(record)}
        for name, value in values.items():
            if not is_metric(name, value):
                continue
            steps, numbers = found.setdefault(name, ([], []))
            steps.append(record["step"])
            numbers.append(value)
    return {name: (tuple(steps), tuple(numbers)) for name, (steps, numbers) in found.items()}


def _of_run(settings: Mapping[str, Any], name: str) -> Any:
    """A setting of the section ``run``; None where there is none, an empty section included."""
    section = settings.get("run")
    return section.get(name) if isinstance(section, Mapping) else None


def _rates(record: Mapping[str, Any]) -> dict[str, float]:
    return {_RATES[name]: speed for name, speed in speeds(record).items()}


def _mapping(path: Path, parse: Any) -> Mapping[str, Any]:
    """A file's map; {} where there is no such file, or not a whole one."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}
