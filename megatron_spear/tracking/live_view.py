"""What a terminal shows while trainer steps go on: time by phase, success, the last trajectory.

    step 12/48 ━━━━━━━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  25%  2.8 s each  ETA 1 min 41 s
    > rollout    ━━━━━━━━━━━━━━━━━━━━━━━━━━            61%   1.71 s  12 trajectories
      train      ━━━━━━━━━━━                           27%   0.76 s
      ...
    success 0.512 (mean of 5 steps), panel 0.250 before   replayed 24   entropy 0.229
    last  look_at_obj_in_light: won after 4 turns; outcome 1, intrinsic 0.03, format 0
          go to desk 1 > take pen 1 > use desklamp 1

Lines are cut at the width of the screen, never wrapped.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_spear.metrics import speeds
from megatron_spear.tracking.speed_text import duration, rate_text
from megatron_spear.tracking.trajectory_text import plain, trajectory_lines
from megatron_spear.types import ScoredTrajectory

_WINDOW = 5
"""Steps whose times and success are averaged."""
_ROWS = {
    "rollout": ("rollout", "rollouts_ahead"),
    "log-probs": ("old_logprobs", "ref_logprobs", "current_logprobs"),
    "train": ("train",),
    "weights": ("weight_sync",),
    "evaluation": ("evaluation",),
}
_SPEEDS = (("rollout", "sampled"), ("train", "trained"))
_NARROW, _WIDEST_BAR = 90, 50

Doing = Callable[[], tuple[str, str]]
"""What the process does now: its task (``step 3``) and the phase of it (``train``)."""


class LiveView:
    """The lines of one run's steps; a rich renderable, drawn by another thread than the one that
    adds to it. ``note`` (``rollout: 12 trajectories``) is shown beside the phase it begins with."""

    def __init__(self, doing: Doing) -> None:
        self._doing = doing
        self._steps: deque[Mapping[str, float]] = deque(maxlen=_WINDOW)
        self._example: tuple[str, str] = ("", "")
        self._evaluation_s = 0.0
        self._panel: tuple[str, ...] = ()
        self.done, self.total, self.rate, self.note = 0, 0, 0.0, ""

    def add(self, metrics: Mapping[str, float], example: ScoredTrajectory | None = None) -> None:
        """A step is done; ``example`` is one of its trajectories."""
        self._steps.append({**metrics, "time/evaluation_s": self._evaluation_s})
        self._evaluation_s = 0.0
        if example is not None:
            self._example = trajectory_lines(example)

    def evaluated(self, step: int, success: float, seconds: float = 0.0) -> None:
        """The panel was played after this step, which took ``seconds`` of the next one's time; the
        first and the last result are shown."""
        when = f"{success:.3f} " + (f"at step {step}" if step else "before")
        self._panel = (*self._panel[:1], when)
        self._evaluation_s = seconds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines at the width of ``options``."""
        width = options.max_width
        yield self._steps_line(width)
        yield self._phases(width)
        for text in self._numbers(width):
            yield _line(text)
        if self._example[0]:
            yield _line(f"last  {self._example[0]}")
            yield _line(f"      {self._example[1]}", style="dim")

    def _steps_line(self, width: int) -> Table:
        told = f"{100 * self.done // max(1, self.total)}%"
        if self.rate > 0:
            each = rate_text(self.rate)
            left = duration((self.total - self.done) / self.rate)
            told += f"  {each}  ETA {left}" if self.done < self.total else f"  {each}"
        name = f"step {self.done}/{self.total}"
        room = width - len(name) - len(told) - 2
        grid = Table.grid(padding=(0, 1))
        bar = _bar(self.done / max(1, self.total), min(_WIDEST_BAR, room))
        grid.add_row(_line(name, style="bold"), bar, _line(told))
        return grid

    def _phases(self, width: int) -> Table:
        shares = self._shares()
        task, phase = self._doing()
        running = _row_of(task, phase)
        grid = Table.grid(padding=(0, 1))
        room = min(_WIDEST_BAR, width - 36 - (20 if width >= _NARROW else 0))
        for name, (share, seconds) in shares.items():
            is_running = name == running
            of, _, what = self.note.partition(": ")
            note = plain(what, 60) if is_running and of == name and width >= _NARROW else ""
            grid.add_row(
                _line(">" if is_running else " ", style="bold"),
                _line(name, style="bold" if is_running else ""),
                _bar(share, room),
                _line(f"{share:4.0%}"),
                _line(f"{seconds:6.2f} s"),
                _line(note, style="dim"),
            )
        if not running and (task or phase):
            other = plain(": ".join(filter(None, (task, phase))), 60)
            notes = ("", "", "", _line(other, style="dim")) if width >= _NARROW else ()
            grid.add_row(_line(">", style="bold"), _line("other", style="bold"), *notes)
        return grid

    def _shares(self) -> dict[str, tuple[float, float]]:
        """Of each row its share of the last steps' time, and seconds a step."""
        steps = list(self._steps)
        count = max(1, len(steps))
        totals = {
            row: sum(step.get(f"time/{phase}_s", 0.0) for step in steps for phase in phases)
            for row, phases in _ROWS.items()
        }
        whole = sum(step.get("time/step_s", 0.0) for step in steps) + totals["evaluation"]
        return {
            row: (min(1.0, seconds / whole) if whole > 0 else 0.0, seconds / count)
            for row, seconds in totals.items()
        }

    def _numbers(self, width: int) -> Iterator[str]:
        steps = list(self._steps)
        last = steps[-1] if steps else {}
        won = [step["rollout/success"] for step in steps if "rollout/success" in step]
        success = []
        if won:
            of = f"mean of {len(won)} steps" if len(won) > 1 else "one step"
            success.append(f"success {sum(won) / len(won):.3f} ({of})")
        if self._panel:
            success.append("panel " + ", ".join(self._panel))
        numbers = [
            f"{name} {last[key]:.4g}"
            for name, key in (("replayed", "replay/rows"), ("entropy", "policy/entropy"))
            if key in last
        ]
        rates = speeds(last)
        numbers += [f"{rates[key]:,.0f} {name} tokens/s" for key, name in _SPEEDS if rates.get(key)]
        if width >= _NARROW:
            yield "   ".join(success)
            yield "   ".join(numbers)
        else:
            yield from success
            yield "  ".join(numbers)


def _row_of(task: str, phase: str) -> str:
    """The row of what is done now; "" where none tells it."""
    if task.startswith("Evaluation"):
        return "evaluation"
    return next((row for row, phases in _ROWS.items() if phase in phases), "")


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _bar(share: float, width: int) -> ProgressBar | Text:
    """A bar, or nothing where there is no room for one."""
    return ProgressBar(total=1.0, completed=share, width=width) if width >= 5 else Text("")
