"""What the user sees while a run goes on: phases, progress bars, lines, and never a silent minute.

On a terminal the bars are live. Elsewhere (a log file, ``tracking.progress=false``) they become
short plain lines. Where nothing was written for a while a heartbeat line says what is being done.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from megatron_spear.heartbeats.heart import begin

_LOG_WIDTH = 120


class Bar:
    """One countable piece of work; made by ``Console.bar``."""

    def __init__(self, console: "Console", name: str, total: int, done: int) -> None:
        self.name, self.total, self.done = name, total, done
        self.values: dict[str, float] = {}
        self._console = console
        self._first = done
        self._started = time.monotonic()

    def advance(self, count: int = 1, **values: float) -> None:
        """``count`` more are done; ``values`` are the few numbers shown beside the bar."""
        self.at(self.done + count, **values)

    def at(self, done: int, **values: float) -> None:
        """``done`` of them are done in all."""
        self.done = done
        self.values.update(values)
        self._console._moved(self)

    @property
    def rate(self) -> float:
        """Done a second since the bar began; 0 before the first."""
        elapsed = time.monotonic() - self._started
        return (self.done - self._first) / elapsed if elapsed > 0 else 0.0

    def shown_values(self) -> str:
        """The numbers beside the bar: ``loss 0.251, success 0.5``."""
        return ", ".join(f"{name} {value:.4g}" for name, value in self.values.items())

    def shown(self) -> str:
        """The bar as a line: ``rollout 12/64 (19%), 3.1/s, ETA 17 s, loss 0.25``."""
        parts = [f"{self.name} {self.done}/{self.total} ({100 * self.done // max(1, self.total)}%)"]
        if self.rate > 0:
            parts.append(_rate(self.rate))
            if self.done < self.total:
                parts.append(f"ETA {duration((self.total - self.done) / self.rate)}")
        return ", ".join([*parts, self.shown_values()]).removesuffix(", ")


class Console:
    """The screen of a run. ``enabled=False`` (ranks other than the controller) shows nothing,
    ``live=False`` shows plain lines on a terminal too.

    Example::

        console.phase("Warm start")
        with console.bar("demonstrations", 300) as bar:
            bar.advance(1, loss=0.7)
        console.line("success 0.25 on 64 games")
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        live: bool = True,
        file: TextIO | None = None,
        line_every_s: float = 5.0,
        heartbeat_s: float = 30.0,
    ) -> None:
        self._enabled = enabled
        self._rich = RichConsole(file=file or sys.stdout, highlight=False, quiet=not enabled)
        self._is_live = enabled and live and self._rich.is_terminal
        if not self._rich.is_terminal:
            self._rich.width = _LOG_WIDTH
        self._line_every_s, self._heartbeat_s = line_every_s, heartbeat_s
        self._live: Progress | None = None
        self._tasks: dict[Bar, TaskID] = {}
        self._doing = "starting"
        self._opened = self._since = self._last_shown = time.monotonic()
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the console was opened, which is the first thing a command does."""
        return time.monotonic() - self._opened

    def phase(self, title: str) -> None:
        """Begin a phase: a heading, and the name heartbeats speak of, on the screen and between
        ranks."""
        begin(title)
        self._doing, self._since = title, time.monotonic()
        self._print(Text(title, style="bold cyan") if self._is_live else f"== {title}")
        self._start_heart()

    def line(self, text: str) -> None:
        """One line of text, shown as it is."""
        self._print(text)

    def beat(self, doing: str) -> None:
        """Say what is being done just now; seen beside the bar, or in the next heartbeat line."""
        self._doing = doing
        for bar, task in list(self._tasks.items())[-1:]:
            if self._live:
                self._live.update(task, values=" ".join([bar.shown_values(), doing]).strip())

    def table(self, rows: Iterable[Sequence[str]], *, title: str = "") -> None:
        """Rows of a name and one or more values."""
        table = Table(title=title or None, show_header=False)
        for row in rows:
            table.add_row(*map(Text, row))
        self._print(table)

    @contextmanager
    def bar(self, name: str, total: int, *, done: int = 0) -> Iterator[Bar]:
        """A progress bar with rate and ETA; ``done`` are there already. Bars may nest."""
        bar = Bar(self, name, total, done)
        self._start_heart()
        doing = self._doing
        self._open(bar)
        try:
            yield bar
        finally:
            self._doing = doing
            self._shut(bar)

    def close(self) -> None:
        """End the heartbeat; the console can still print."""
        self._closed.set()
        if self._heart:
            self._heart.join()

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def log_handler(self) -> logging.Handler:
        """A handler that writes log records above the live bars instead of through them."""
        return _ConsoleHandler(self)

    def _open(self, bar: Bar) -> None:
        self._tasks[bar] = TaskID(-1)
        if not self._is_live:
            return
        if self._live is None:
            self._live = Progress(*_columns(), console=self._rich, transient=True)
            self._live.start()
        self._tasks[bar] = self._live.add_task(
            bar.name, total=bar.total, completed=bar.done, values=""
        )

    def _shut(self, bar: Bar) -> None:
        task = self._tasks.pop(bar)
        if self._live is None:
            return
        self._live.remove_task(task)
        if not self._tasks:
            self._live.stop()
            self._live = None

    def _moved(self, bar: Bar) -> None:
        if self._live is not None and bar in self._tasks:
            self._live.update(
                self._tasks[bar],
                completed=bar.done,
                values=bar.shown_values(),
            )
        elif self._enabled:
            waited = time.monotonic() - max(self._last_shown, bar._started)
            if waited >= self._line_every_s:
                self._print(f"  {bar.shown()}")

    def _print(self, what: str | Text | Table) -> None:
        self._last_shown = time.monotonic()
        self._rich.print(what, markup=False, soft_wrap=isinstance(what, str))

    def _start_heart(self) -> None:
        if self._enabled and self._heart is None:
            self._heart = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
            self._heart.start()

    def _beat_on(self) -> None:
        while not self._closed.wait(self._heartbeat_s / 4):
            silent = time.monotonic() - self._last_shown
            if self._live is None and silent >= self._heartbeat_s:
                bars = [bar.shown() for bar in tuple(self._tasks)]
                doing = "; ".join([*bars, self._doing])
                self._print(f"  ... {doing}; {duration(time.monotonic() - self._since)} so far")


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.line(self.format(record))


class _RateColumn(ProgressColumn):
    """Done a second; rich has this for bytes only."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed) if task.speed else "", style="dim")


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _RateColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", style="dim"),
    )


def _rate(per_s: float) -> str:
    return f"{per_s:.1f}/s" if per_s >= 1 else f"{1 / per_s:.1f} s each"


def duration(seconds: float) -> str:
    """Seconds for people: ``17 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
