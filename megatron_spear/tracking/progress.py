"""What the user sees while a run goes on: phases, progress bars, lines, and never a silent minute.

On a terminal the bars are live. Elsewhere (a log file, ``tracking.progress=false``) they become
short plain lines. Where nothing was written for a while a heartbeat line says what is being done.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TextIO, TypeVar

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
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
from megatron_spear.tracking.bars import Bar, StepsBar
from megatron_spear.tracking.speed_text import duration, rate_text

_LOG_WIDTH = 120
_REFRESHES_A_SECOND = 2.0
_AnyBar = TypeVar("_AnyBar", bound=Bar)


class _Screen(RichConsole):
    """Rich's console, but for output that nobody reads any more: there it would end the process
    without a word; here the command hears of it."""

    def on_broken_pipe(self) -> None:
        """Called where a BrokenPipeError is being handled: hand it on."""
        raise


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
        self._rich = _Screen(file=file or sys.stdout, highlight=False, quiet=not enabled)
        self._is_live = enabled and live and self._rich.is_terminal
        if not self._rich.is_terminal:
            self._rich.width = _LOG_WIDTH
        self._line_every_s, self._heartbeat_s = line_every_s, heartbeat_s
        self._live: Live | None = None
        self._bars = Progress(*_columns(), console=self._rich, auto_refresh=False)
        self._steps: StepsBar | None = None
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
        if self._steps is not None:
            self._steps.view.note = doing
        for bar, task in list(self._tasks.items())[-1:]:
            if self._live and bar is not self._steps:
                self._bars.update(task, values=" ".join([bar.shown_values(), doing]).strip())

    def table(self, rows: Iterable[Sequence[str]], *, title: str = "") -> None:
        """Rows of a name and one or more values."""
        table = Table(title=title or None, show_header=False)
        for row in rows:
            table.add_row(*map(Text, row))
        self._print(table)

    @contextmanager
    def bar(self, name: str, total: int, *, done: int = 0) -> Iterator[Bar]:
        """A progress bar with rate and ETA; ``done`` are there already. Bars may nest."""
        with self._opened_bar(Bar(self._moved, name, total, done)) as bar:
            yield bar

    @contextmanager
    def steps(self, total: int, *, done: int = 0) -> Iterator[StepsBar]:
        """The trainer steps, with all that is worth seeing of them on a terminal. Bars may be
        opened inside."""
        with self._opened_bar(StepsBar(self._moved, total, done)) as bar:
            yield bar

    @contextmanager
    def _opened_bar(self, bar: _AnyBar) -> Iterator[_AnyBar]:
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
        if isinstance(bar, StepsBar):
            self._steps = bar
            self._moved_steps(bar)
        else:
            self._tasks[bar] = self._bars.add_task(
                bar.name, total=bar.total, completed=bar.done, values=""
            )
        if self._live is None:
            self._live = Live(
                get_renderable=self._screen,
                console=self._rich,
                transient=True,
                refresh_per_second=_REFRESHES_A_SECOND,
            )
            self._live.start()
        self._live.refresh()

    def _shut(self, bar: Bar) -> None:
        task = self._tasks.pop(bar)
        if self._live is None:
            return
        if bar is self._steps:
            self._steps = None
        else:
            self._bars.remove_task(task)
        if not self._tasks:
            self._live.stop()
            self._live = None

    def _moved(self, bar: Bar) -> None:
        if self._live is not None and bar in self._tasks:
            if isinstance(bar, StepsBar):
                self._moved_steps(bar)
            else:
                self._bars.update(self._tasks[bar], completed=bar.done, values=bar.shown_values())
        elif self._enabled:
            waited = time.monotonic() - max(self._last_shown, bar.started)
            if waited >= self._line_every_s:
                self._print(f"  {bar.shown()}")

    def _moved_steps(self, bar: StepsBar) -> None:
        bar.view.done, bar.view.total, bar.view.rate = bar.done, bar.total, bar.rate

    def _screen(self) -> Group:
        """What the live part of the screen shows: the steps, and below them the other bars."""
        steps = [self._steps] if self._steps is not None else []
        return Group(*steps, *([self._bars] if self._bars.task_ids else []))

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
                with suppress(BrokenPipeError):  # not from a thread
                    self._print(f"  ... {doing}; {duration(time.monotonic() - self._since)} so far")


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(BrokenPipeError):  # a line of the run tells it, from where it can end the run
            self._console.line(self.format(record))


class _RateColumn(ProgressColumn):
    """Done a second; rich has this for bytes only."""

    def render(self, task: Task) -> Text:
        return Text(rate_text(task.speed) if task.speed else "", style="dim")


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
