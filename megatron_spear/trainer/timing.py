"""Wall time by phase of one trainer step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_spear.heartbeats import heart as heartbeats

PRODUCTIVE = (
    "rollout",
    "rollouts_ahead",
    "old_logprobs",
    "ref_logprobs",
    "current_logprobs",
    "train",
)


class PhaseTimer:
    """Adds up seconds by phase; ``metrics()`` gives ``time/<phase>_s`` and ``time/step_s``.

    ``time/other_fraction`` is the share of the step spent outside the ``PRODUCTIVE`` phases.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body under this name (phases may repeat, and must not nest)."""
        started = time.perf_counter()
        try:
            with heartbeats.phase(name):
                yield
        finally:
            seconds = time.perf_counter() - started
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """All phases so far."""
        total = time.perf_counter() - self._started
        productive = sum(self._seconds.get(name, 0.0) for name in PRODUCTIVE)
        metrics = {f"time/{name}_s": value for name, value in self._seconds.items()}
        metrics["time/step_s"] = total
        metrics["time/other_fraction"] = max(0.0, 1.0 - productive / total) if total else 0.0
        return metrics
