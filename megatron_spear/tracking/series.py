"""A metric of a run as numbers to draw."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.metrics import is_metric

Array = npt.NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]
"""Of ``metrics.jsonl``, a step each (``jsonl.read_metrics``)."""


def series(records: Records, metric: str) -> tuple[Array, Array]:
    """Steps and values of a metric, float64; records without a number of it are left out."""
    pairs = [(r["step"], r[metric]) for r in records if is_metric(metric, r.get(metric))]
    table = np.array(pairs, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
