"""Metric names, what names and values tell, and how values of one step are merged; no input or
output here."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

RUN_PREFIXES = frozenset(
    (
        "curriculum",
        "eval",
        "filter",
        "loss",
        "mismatch",
        "optimizer",
        "policy",
        "prompts",
        "replay",
        "reward",
        "rollout",
        "sft",
        "time",
        "train",
        "weight_sync",
        "work",
    )
)
"""First parts of the names that a run reports itself; a user's hook takes another."""


SPEEDS = {
    "rollout": ("rollout/action_tokens", "time/rollout_s"),
    "train": ("train/tokens", "time/train_s"),
    "step": ("rollout/action_tokens", "time/step_s"),
}
"""Speeds that a step's metrics give: tokens, and the seconds that they took."""

_NO_METRICS = ("step", "time")
_NO_PHASES = ("step", "eval")


def is_metric(name: str, value: object) -> bool:
    """Whether an entry of a record of ``metrics.jsonl`` is a metric with a finite number."""
    return name not in _NO_METRICS and is_number(value)


def is_number(value: object) -> bool:
    """Whether an entry is a finite number; true and false are none."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) and math.isfinite(value)


def phases(names: Iterable[str]) -> list[str]:
    """The phases of a step that these metrics have the time of, sorted.

    Example: ``time/train_s`` and ``time/step_s`` give ``["train"]``, for a step is all of them.
    """
    times = {name for name in names if name.startswith("time/") and name.endswith("_s")}
    found = {name.removeprefix("time/").removesuffix("_s") for name in times}
    return sorted(found.difference(_NO_PHASES))


def speeds(record: Mapping[str, Any]) -> dict[str, float]:
    """Tokens a second by the names of ``SPEEDS``, of those that the record has both numbers of.

    Example: ``{"train/tokens": 900, "time/train_s": 2.0}`` gives ``{"train": 450.0}``.
    """
    return {
        name: record[tokens] / record[seconds]
        for name, (tokens, seconds) in SPEEDS.items()
        if record.get(tokens) is not None and record.get(seconds)
    }


def merge(records: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Merge metric records of parts of one step into one record.

    The last component of the name decides: ``num_*`` and ``*tokens`` are summed, ``max_*``
    takes the maximum, all others are averaged.

    Example: ``merge([{"loss/policy": 1.0, "data/num_rows": 2}, {"loss/policy": 3.0,
    "data/num_rows": 4}])`` is ``{"loss/policy": 2.0, "data/num_rows": 6}``.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            values[name].append(float(value))
    return {name: _combine(name, series) for name, series in values.items()}


def _combine(name: str, series: list[float]) -> float:
    last = name.rsplit("/", 1)[-1]
    if last.startswith("num_") or last.endswith("tokens"):
        return sum(series)
    if last.startswith("max_"):
        return max(series)
    return sum(series) / len(series)
