"""Long-tailed lengths of trajectories: a log-normal distribution, cut at a longest length."""

from dataclasses import dataclass
from functools import lru_cache
from math import erf, exp, log, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_NORMAL = NormalDist()


@dataclass(frozen=True, kw_only=True, slots=True)
class LongTail:
    """Sampled tokens of a trajectory: ``min(X, longest)`` with log-normal X, mean ``mean``.

    ``spread`` is the standard deviation of log X; 0 = all are ``mean`` long. The mean is that after
    the cut, which is what logs of a run show.

    Example: mean 795, longest 4096, spread 1: half are below 507, 2 % are cut.
    """

    mean: float
    longest: int
    spread: float = 1.0

    def __post_init__(self) -> None:
        assert 0 < self.mean <= self.longest, (self.mean, self.longest)

    @property
    def mean_square(self) -> float:
        """Of the lengths; over the squared mean it says how uneven they are."""
        middle, spread = self._log_normal()
        if spread == 0:
            return self.mean**2
        place = (log(self.longest) - middle) / spread
        whole = exp(2 * middle + 2 * spread**2)
        cut = 1 - _below(place)
        return whole * _below(place - 2 * spread) + self.longest**2 * cut

    def quantile(self, share: float) -> float:
        """The length below which a share of the trajectories is; at least 1."""
        middle, spread = self._log_normal()
        return min(max(exp(middle + spread * _NORMAL.inv_cdf(share)), 1.0), self.longest)

    def quantiles(self, count: int) -> Floats:
        """``[count]`` lengths, rising, that stand for the trajectories: those in the middle of as
        many equal parts."""
        return _quantiles(self, count)

    def draw(self, generator: np.random.Generator, count: int) -> Floats:
        """``[count]`` lengths, whole tokens."""
        middle, spread = self._log_normal()
        drawn = np.exp(middle + spread * generator.standard_normal(count))
        return np.clip(np.rint(drawn), 1.0, self.longest)

    def _log_normal(self) -> tuple[float, float]:
        if self.mean >= self.longest or self.spread == 0:
            return log(self.mean), 0.0
        return _middle(self.mean, self.longest, self.spread), self.spread


def spread_of(mean: float, p99: float) -> float:
    """The spread of a log-normal whose 99 % quantile is ``p99``; that of the widest where the ratio
    is above what any has (15)."""
    z = 2.3263478740408408
    ratio = log(p99 / mean)
    return z - sqrt(max(0.0, z * z - 2 * ratio))


@lru_cache(maxsize=64)
def _quantiles(tail: LongTail, count: int) -> Floats:
    found = np.array([tail.quantile((part + 0.5) / count) for part in range(count)])
    found.flags.writeable = False
    return found


@lru_cache(maxsize=64)
def _middle(mean: float, longest: float, spread: float) -> float:
    """Mean of log X, such that the cut lengths have the mean ``mean``."""
    low, high = log(mean) - 10 * spread - spread**2, log(longest) + 20 * spread
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _cut_mean(middle, longest, spread) < mean else (low, middle)
    return (low + high) / 2


def _cut_mean(middle: float, longest: float, spread: float) -> float:
    place = (log(longest) - middle) / spread
    whole = exp(min(middle + spread**2 / 2, 700.0))
    return whole * _below(place - spread) + longest * (1 - _below(place))


def _below(x: float) -> float:
    return 0.5 * (1 + erf(x / sqrt(2)))
