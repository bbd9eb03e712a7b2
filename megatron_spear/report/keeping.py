"""Reads recorded trajectories, the newest first, and decides which of them fit into the report.

Memory grows with the report's limit, not with the run: of each step the list's rows are kept, up to
``MAX_ROWS``, and packed lines only as long as those of all newer steps leave them room.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_spear.errors import DataError
from megatron_spear.report.bodies import body_line, pack
from megatron_spear.report.listing import Listing, Row, replayed_of, rows_of
from megatron_spear.report.runs import Run
from megatron_spear.tracking.recorded_files import list_steps, read_step, step_file

log = logging.getLogger(__name__)

BEST_A_STEP = 4
"""Trajectories kept of a step that is not kept whole."""

NEWEST_SHARE = 0.75
"""Of the space, for whole steps where not all fit; the rest is for the best of older ones."""

MAX_ROWS = 100_000
"""Trajectories in the list; more would make the page slow."""

_BASE64 = 4 / 3


@dataclass(frozen=True, slots=True)
class Packed:
    """Packed lines, and how many bytes they are; ``lines`` is None where they are not kept."""

    size: int
    lines: bytes | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of one run, ready for the report: packed whole, and packed with its best alone, each
    None where it was never needed."""

    run: int
    step: int
    facts: Mapping[str, Any]
    rows: tuple[Row, ...]
    replayed: tuple[dict[str, Any], ...]
    whole: Packed | None
    best: Packed | None
    best_rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Its rows in the list's two tables."""
        return len(self.rows) + len(self.replayed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The recorded steps that the list holds, oldest first, and how many older ones there are."""

    listed: tuple[Step, ...]
    num_older: int

    def __len__(self) -> int:
        return len(self.listed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What goes into the report. ``chunks`` are packed lines; the listing points into them.

    ``notes`` say what was left out and why, in sentences.
    """

    listing: Listing
    chunks: tuple[bytes, ...]
    steps: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


class StepReader:
    """Reads the steps of runs, each file once: a report that is written again and again
    (``--watch``) reads what is new. ``max_bytes`` is the size of the largest report."""

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._known: dict[tuple[str, int, int], Step] = {}
        self.damaged: tuple[str, ...] = ()

    def read(self, runs: Sequence[Run]) -> Steps:
        """The newest recorded steps of the runs, as many as the list holds; ``damaged`` has the
        files that cannot be read."""
        files = sorted(
            ((step, n) for n, run in enumerate(runs) for step in list_steps(run.trajectories)),
            reverse=True,
        )
        whole, best = _Room(self._max_bytes / _BASE64), _Room(self._max_bytes / _BASE64)
        known: dict[tuple[str, int, int], Step] = {}
        listed: list[Step] = []
        damaged: list[tuple[int, int]] = []
        rows, num_older = 0, 0
        for place, (step, number) in enumerate(files):
            try:
                key = _key(number, runs[number], step)
                found = self._known.get(key)
                if found is None or whole.misses(found.whole) or best.misses(found.best):
                    found = _read(number, runs[number], step, whole.is_open, best.is_open)
            except FileNotFoundError:
                continue  # a resumed run plays this step again
            except DataError as error:
                log.warning("%s", error)
                damaged.append((number, step))
                continue
            found = replace(found, whole=whole.take(found.whole), best=best.take(found.best))
            known[key] = found
            rows += found.num_rows
            if rows > MAX_ROWS and listed:
                num_older = len(files) - place
                break
            listed.append(found)
        self._known = known
        self.damaged = tuple(f"{runs[n].name}, step {step}" for n, step in sorted(damaged))
        return Steps(listed=tuple(listed[::-1]), num_older=num_older)


class _Room:
    """How many bytes of one kind of packed lines are of use, the newest steps first."""

    def __init__(self, num_bytes: float) -> None:
        self._left = num_bytes
        self.is_open = True

    def misses(self, packed: Packed | None) -> bool:
        """Whether these lines have room and are not kept."""
        if packed is None:
            return self.is_open
        return self.is_open and packed.lines is None and packed.size <= self._left

    def take(self, packed: Packed | None) -> Packed | None:
        """The same, without its lines from the first step on that has no room."""
        if packed is None:
            return None
        self._left -= packed.size
        self.is_open = self.is_open and self._left >= 0
        return packed if self.is_open else Packed(packed.size, None)


def keep(steps: Steps, max_bytes: float) -> Kept:
    """What of the steps goes into ``max_bytes`` of base64: everything if it fits, else the newest
    steps whole and of older ones the best. ``max_bytes`` is at most the reader's."""
    chosen = _choose(steps.listed, max_bytes)
    listing, bodies = Listing(), 0
    chunks: list[bytes] = []
    for step in steps.listed:
        packed, numbers = chosen.get((step.run, step.step), (b"", ()))
        place = {number: (len(chunks), line) for line, number in enumerate(numbers)}
        if numbers:
            chunks.append(packed)
        bodies += len(numbers)
        listing.add(step.run, step.step, step.rows, step.replayed, place)
    return Kept(
        listing=listing,
        chunks=tuple(chunks),
        steps=tuple({"run": s.run, "step": s.step, **s.facts} for s in steps.listed),
        notes=_notes(steps, bodies, max_bytes),
    )


def _key(number: int, run: Run, step: int) -> tuple[str, int, int]:
    status = step_file(run.trajectories, step).stat()
    return f"{number}:{step}", status.st_mtime_ns, status.st_size


def _read(number: int, run: Run, step: int, needs_whole: bool, needs_best: bool) -> Step:
    recorded = read_step(run.trajectories, step)
    rows = rows_of(recorded)
    needs = needs_whole or needs_best
    lines = [body_line(trajectory) for trajectory in recorded.trajectories] if needs else []
    order = sorted(range(len(rows)), key=lambda n: -rows[n].goodness)[:BEST_A_STEP]
    best = tuple(sorted(order))
    return Step(
        run=number,
        step=step,
        facts={
            "version": recorded.policy_version,
            "intrinsic_weight": recorded.intrinsic_weight,
            "replay_weight": recorded.replay_weight,
        },
        rows=rows,
        replayed=replayed_of(recorded),
        whole=_packed(lines) if needs_whole else None,
        best=_packed([lines[n] for n in best]) if needs_best else None,
        best_rows=best,
    )


def _packed(lines: Sequence[str]) -> Packed:
    packed = pack(lines)
    return Packed(len(packed), packed)


def _choose(
    steps: Sequence[Step], max_bytes: float
) -> dict[tuple[int, int], tuple[bytes, tuple[int, ...]]]:
    """For each step that has some: its packed lines, and the numbers of their rows."""
    sizes = [step.whole.size if step.whole else math.inf for step in steps]
    fits = sum(sizes) * _BASE64 <= max_bytes
    whole_bytes = max_bytes if fits else max_bytes * NEWEST_SHARE
    chosen: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
    used, is_whole = 0.0, True
    for step, size in zip(reversed(steps), reversed(sizes), strict=True):
        is_whole = is_whole and used + size * _BASE64 <= whole_bytes
        packed = step.whole if is_whole else step.best
        if packed is None or packed.lines is None or used + packed.size * _BASE64 > max_bytes:
            break
        used += packed.size * _BASE64
        numbers = tuple(range(len(step.rows))) if is_whole else step.best_rows
        chosen[step.run, step.step] = (packed.lines, numbers)
    return chosen


def _notes(steps: Steps, bodies: int, max_bytes: float) -> tuple[str, ...]:
    notes = []
    if steps.num_older:
        notes.append(
            f"The list begins with step {steps.listed[0].step}: it holds {MAX_ROWS:,} rows at "
            f"most. {steps.num_older} older recorded steps are not in it."
        )
    rows = sum(len(step.rows) for step in steps.listed)
    if bodies < rows:
        notes.append(
            f"{rows - bodies:,} of {rows:,} listed trajectories are here without their turns, to "
            f"keep the file below its limit ({max_bytes / 1e6:.1f} MB for turns): the newest steps "
            f"are whole, of older ones the {BEST_A_STEP} of the highest reward are kept as far as "
            "they fit. --max-mb raises the limit; the run's folder has them all."
        )
    return tuple(notes)
