"""Tasks drawn by measured difficulty: most where success is neither rare nor certain.

A bucket is a kind of task (ALFWorld: its task type). Where its success share is p, rewards within a
group have the variance p (1 - p): that is what group-relative advantages can learn from, and it is
0 for what is always or never won.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.config.method import TaskSamplingSection
from megatron_spear.errors import ConfigError

_FloatArray = npt.NDArray[np.float64]

_UNKNOWN_SUCCESS = 0.5
"""Success taken for a bucket nothing was measured of yet: the one that is drawn most."""


def bucket_shares(success: _FloatArray, min_share: float) -> _FloatArray:
    """float64 ``[B]``, sum 1: each bucket's probability, for its success share ``[B]``.

    ``min_share`` each; the rest in proportion to p (1 - p), evenly where that is 0 everywhere.
    Example: success 0.5, 0.9, 1.0 with min_share 0.1: p (1 - p) is 0.25, 0.09, 0, so the shares are
    0.1 + 0.7 * (0.735, 0.265, 0) = 0.615, 0.285, 0.1.
    """
    signal = success * (1.0 - success)
    total = signal.sum()
    parts = signal / total if total > 0.0 else np.full(len(signal), 1.0 / len(signal))
    shares: _FloatArray = min_share + (1.0 - min_share * len(signal)) * parts
    return shares


class TaskSampler:
    """The success of each bucket as measured so far, and which buckets come next.

    Wins and attempts are counted; a step later each counts ``decay`` times as much.
    Example (decay 0.5): 2 wins of 4, a step later 4 of 4: (1 + 4) / (2 + 4) = 0.833.

    Raises ConfigError where ``min_share`` of every bucket is more than there is.
    """

    def __init__(self, buckets: Sequence[str], section: TaskSamplingSection) -> None:
        if section.min_share * len(buckets) > 1.0:
            raise ConfigError(
                f"curriculum.tasks.min_share: got {section.min_share:g} for {len(buckets)} "
                f"buckets, expected at most {1 / len(buckets):.3g}; lower it"
            )
        self.buckets = tuple(buckets)
        self._section = section
        self._wins = np.zeros(len(buckets))
        self._attempts = np.zeros(len(buckets))

    @property
    def success(self) -> dict[str, float]:
        """Success share of each bucket that was attempted."""
        measured = zip(self.buckets, self._success().tolist(), self._attempts, strict=True)
        return {bucket: share for bucket, share, attempts in measured if attempts > 0.0}

    @property
    def shares(self) -> dict[str, float]:
        """Probability by bucket of the next draw."""
        return dict(zip(self.buckets, self._shares().tolist(), strict=True))

    def pick(self, uniforms: _FloatArray) -> list[str]:
        """A bucket for each number in [0, 1), a function of these and of what was measured."""
        edges = np.cumsum(self._shares())
        indices = np.searchsorted(edges / edges[-1], uniforms, side="right")
        return [self.buckets[index] for index in indices]

    def measure(self, won: Mapping[str, Sequence[bool]]) -> None:
        """One step's attempts by bucket: won or not."""
        unknown = sorted(set(won) - set(self.buckets))
        assert not unknown, f"attempts at {unknown}, which are no buckets of {self.buckets}"
        results = [won.get(bucket, ()) for bucket in self.buckets]
        decay = self._section.decay
        self._wins = decay * self._wins + np.array([sum(result) for result in results])
        self._attempts = decay * self._attempts + np.array([len(result) for result in results])

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Decayed wins and attempts by bucket, as plain JSON values."""
        counts = {"wins": self._wins, "attempts": self._attempts}
        return {
            name: dict(zip(self.buckets, values.tolist(), strict=True))
            for name, values in counts.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Take back what ``state_dict`` gave, of the same buckets."""
        self._wins = np.array([state["wins"][bucket] for bucket in self.buckets])
        self._attempts = np.array([state["attempts"][bucket] for bucket in self.buckets])

    def _success(self) -> _FloatArray:
        known = self._attempts > 0.0
        return np.where(known, self._wins / np.where(known, self._attempts, 1.0), _UNKNOWN_SUCCESS)

    def _shares(self) -> _FloatArray:
        return bucket_shares(self._success(), self._section.min_share)
