"""Where metrics go: one tracker that fans out to sinks, none of which can stop a run."""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_spear.config.schema import TrackingSection
from megatron_spear.tracking.jsonl import METRICS_FILE, JsonlSink
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

    ``lasting`` names those that are never left out: they get the next record too, and their failure
    is told once, until a record went well again.

    Example: ``Tracker({"metrics.jsonl": JsonlSink(path)}).log(3, {"reward/mean": 0.25})``.
    """

    def __init__(self, sinks: Mapping[str, Sink], *, lasting: Collection[str] = ()) -> None:
        self._sinks = dict(sinks)
        self._lasting, self._failing = frozenset(lasting), set[str]()

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
            what = f"{type(error).__name__}: {error}"
            if name not in self._lasting:
                del self._sinks[name]
                log.warning("%s failed %s and gets no further metrics: %s", name, when, what)
            elif name not in self._failing:
                self._failing.add(name)
                log.warning("%s failed %s and is tried again each time: %s", name, when, what)
        else:
            if name in self._failing:
                self._failing.remove(name)
                log.warning("%s could be used again %s", name, when)


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
    records of what came after it are dropped, so that nothing is there twice. A wandb that cannot
    be used is left out with a warning; ``metrics.jsonl`` is opened with the next record then.
    """
    jsonl = JsonlSink(folder / METRICS_FILE, resumed_step=resumed_step)
    sinks: dict[str, Sink] = {METRICS_FILE: jsonl}
    try:
        jsonl.open()
    except OSError as error:
        log.warning("%s cannot be opened yet: %s: %s", METRICS_FILE, type(error).__name__, error)
    if section.wandb:
        try:
            sinks["wandb"] = WandbSink.open(
                folder, project=section.project, name=name, config=config
            )
        except Exception as error:  # noqa: BLE001  metrics must never end a run
            log.warning("wandb cannot be used: %s: %s", type(error).__name__, error)
    return Tracker(sinks, lasting=(METRICS_FILE,))
