"""Countable pieces of work: what there is of them, how fast it goes, and as a line."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.text import Text

from megatron_spear.heartbeats.heart import doing
from megatron_spear.tracking.live_view import LiveView
from megatron_spear.tracking.speed_text import duration, rate_text
from megatron_spear.types import ScoredTrajectory

log = logging.getLogger(__name__)


class Bar:
    """One countable piece of work; ``moved`` hears of each change."""

    def __init__(self, moved: Callable[["Bar"], None], name: str, total: int, done: int) -> None:
        self.name, self.total, self.done = name, total, done
        self.values: dict[str, float] = {}
        self.started = time.monotonic()
        self._moved, self._first = moved, done

    def advance(self, count: int = 1, **values: float) -> None:
        """``count`` more are done; ``values`` are the few numbers shown beside the bar."""
        self.at(self.done + count, **values)

    def at(self, done: int, **values: float) -> None:
        """``done`` of them are done in all."""
        self.done = done
        self.values.update(values)
        self._moved(self)

    @property
    def rate(self) -> float:
        """Done a second since the bar began; 0 before the first."""
        elapsed = time.monotonic() - self.started
        return (self.done - self._first) / elapsed if elapsed > 0 else 0.0

    def shown_values(self) -> str:
        """The numbers beside the bar: ``loss 0.251, success 0.5``."""
        return ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())

    def shown(self) -> str:
        """The bar as a line: ``rollout 12/64 (19%), 3.1/s, ETA 17 s, loss 0.25``."""
        parts = [f"{self.name} {self.done}/{self.total} ({100 * self.done // max(1, self.total)}%)"]
        if self.rate > 0:
            parts.append(rate_text(self.rate))
            if self.done < self.total:
                parts.append(f"ETA {duration((self.total - self.done) / self.rate)}")
        return ", ".join([*parts, self.shown_values()]).removesuffix(", ")


class StepsBar(Bar):
    """The trainer steps of a run: a live view on a terminal, else a bar as any; made by
    ``Console.steps``. What cannot be shown is left out: a screen never ends a run."""

    def __init__(self, moved: Callable[[Bar], None], total: int, done: int) -> None:
        super().__init__(moved, "step", total, done)
        self.view = LiveView(doing)
        self._trouble = ""
        self._has_warned = False

    def finished(
        self, metrics: Mapping[str, float], example: ScoredTrajectory | None = None
    ) -> None:
        """One more step is done; ``example`` is one of its trajectories."""
        with self._kept_going():
            self.view.add(metrics, example)
        if self._trouble and not self._has_warned:  # not where it came up: that may be a drawing
            self._has_warned = True
            log.warning("the live view leaves something out: %s", self._trouble)
        self.advance(1, **{k: metrics[name] for k, name in _SHOWN.items() if name in metrics})

    def evaluated(self, step: int, success: float, seconds: float = 0.0) -> None:
        """The panel was played after this step, in so many seconds."""
        with self._kept_going():
            self.view.evaluated(step, success, seconds)

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """The live view, or the bar as a line where it cannot be drawn."""
        with self._kept_going():
            yield from list(console.render(self.view, options))
            return
        yield Text(self.shown(), no_wrap=True, overflow="ellipsis")

    @contextmanager
    def _kept_going(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  a screen must never end a run
            self._trouble = f"{type(error).__name__}: {error}"


_SHOWN = {"success": "rollout/success", "replayed": "replay/rows", "entropy": "policy/entropy"}
"""The few numbers beside the steps' bar."""
