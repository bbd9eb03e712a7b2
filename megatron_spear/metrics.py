"""Metric names and how values of one step are merged; no input or output here."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

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
