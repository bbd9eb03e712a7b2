"""Means over seeds with their 95 % intervals (Student's t)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spear.report.runs import Series

_T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
_Z95 = 1.959964


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean over ``n`` runs; ``low`` and ``high`` are None with fewer than two."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """An interval at each of ``steps``."""

    steps: tuple[int, ...]
    intervals: tuple[Interval, ...]


def t95(freedom: int) -> float:
    """Student's t that 95 % lie within, with so many degrees of freedom (>= 1).

    Example: ``t95(4)`` is 2.7764: five seeds.
    """
    assert freedom >= 1
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    z = _Z95  # Cornish-Fisher, within 0.0005 here
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval_of(values: Sequence[float]) -> Interval:
    """The mean of the runs' values (one or more) and its interval.

    Example: (0.4, 0.6) gives 0.5 in -0.77 .. 1.77: two runs say little.
    """
    numbers = np.asarray(values, dtype=np.float64)
    mean, n = float(numbers.mean()), len(numbers)
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n)
    half = t95(n - 1) * float(numbers.std(ddof=1)) / n**0.5
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def band_of(runs: Sequence[Series]) -> Band:
    """The band of one metric over runs, at the steps that all of them have.

    Steps that only some have are left out: a mean that changes its members would jump.
    """
    tables = [dict(zip(steps, values, strict=True)) for steps, values in runs]
    common = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return Band(
        steps=tuple(common),
        intervals=tuple(interval_of([table[step] for table in tables]) for step in common),
    )
