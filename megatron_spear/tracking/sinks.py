"""Where metrics go: one tracker that fans out to sinks, none of which can stop a run."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_spear.config.schema import TrackingSection
from megatron_spear.tracking.jsonl import JsonlSink
from megatron_spear.tracking.wandb_sink import WandbSink

log = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination of metrics; it may raise, the tracker takes care of that."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Write out what is waiting."""


class Tracker:
    """Hands each record to every sink; a sink that raises is left out from then on, told once.

    Example: ``Tracker({"metrics.jsonl": JsonlSink(path)}).log(3, {"reward/mean": 0.25})``.
    """

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One record of a step; a step may have several (training, then evaluation)."""
        for name in tuple(self._sinks):
            self._guarded(name, f"at step {step}", lambda sink: sink.log(step, metrics))

    def close(self) -> None:
        """Close all sinks; the tracker may not be used afterwards."""
        for name in tuple(self._sinks):
            self._guarded(name, "while closing", lambda sink: sink.close())
        self._sinks.clear()

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of the sinks still in use."""
        return tuple(self._sinks)

    def _guarded(self, name: str, when: str, use: Callable[[Sink], None]) -> None:
        try:
            use(self._sinks[name])
        except Exception as error:  # noqa: BLE001  metrics must never end a run
            del self._sinks[name]
            log.warning(
                "%s failed %s and gets no further metrics: %s: %s",
                name,
                when,
                type(error).__name__,
                error,
            )


def build_tracker(
    section: TrackingSection,
    *,
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    resumed_step: int | None = None,
) -> Tracker:
    """The tracker of a run: ``metrics.jsonl`` always, wandb where ``tracking.wandb`` is set.

    ``folder`` is the run directory, ``config`` the resolved configuration as plain values.
    ``resumed_step`` is the step of the checkpoint a resumed run starts from (None = a new run):
    records of what came after it are dropped, so that nothing is there twice. A sink that cannot be
    made is left out with a warning.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "metrics.jsonl": lambda: JsonlSink(folder / "metrics.jsonl", resumed_step=resumed_step)
    }
    if section.wandb:
        makers["wandb"] = lambda: WandbSink.open(
            folder, project=section.project, name=name, config=config
        )
    sinks: dict[str, Sink] = {}
    for kind, make in makers.items():
        try:
            sinks[kind] = make()
        except Exception as error:  # noqa: BLE001  metrics must never end a run
            log.warning("%s cannot be used: %s: %s", kind, type(error).__name__, error)
    return Tracker(sinks)
