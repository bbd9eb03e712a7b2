"""Reads recorded trajectories step by step and decides which of them fit into the report."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of one run, ready for the report: packed whole, and packed with its best alone."""

    run: int
    step: int
    facts: Mapping[str, Any]
    rows: tuple[Row, ...]
    replayed: tuple[dict[str, Any], ...]
    whole: bytes
    best: bytes
    best_rows: tuple[int, ...]


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
    (``--watch``) reads what is new."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], Step] = {}
        self.damaged: tuple[str, ...] = ()

    def read(self, runs: Sequence[Run]) -> tuple[Step, ...]:
        """All recorded steps of the runs, oldest first; ``damaged`` has the files that cannot be
        read."""
        found: dict[tuple[str, int, int], Step] = {}
        damaged = []
        for number, run in enumerate(runs):
            for step in list_steps(run.trajectories):
                try:
                    status = step_file(run.trajectories, step).stat()
                    key = (f"{number}:{step}", status.st_mtime_ns, status.st_size)
                    found[key] = self._known.get(key) or _read(number, run, step)
                except FileNotFoundError:
                    continue  # a resumed run plays this step again
                except DataError as error:
                    log.warning("%s", error)
                    damaged.append(f"{run.name}, step {step}")
        self._known, self.damaged = found, tuple(damaged)
        return tuple(sorted(found.values(), key=lambda step: (step.step, step.run)))


def keep(steps: Sequence[Step], max_bytes: float) -> Kept:
    """What of the steps goes into ``max_bytes`` of base64: everything if it fits, else the newest
    steps whole and of older ones the best."""
    listed = _newest_rows(steps)
    chosen = _choose(listed, max_bytes)
    listing, bodies = Listing(), 0
    chunks: list[bytes] = []
    for step in listed:
        packed, numbers = chosen.get((step.run, step.step), (b"", ()))
        place = {number: (len(chunks), line) for line, number in enumerate(numbers)}
        if numbers:
            chunks.append(packed)
        bodies += len(numbers)
        listing.add(step.run, step.step, step.rows, step.replayed, place)
    return Kept(
        listing=listing,
        chunks=tuple(chunks),
        steps=tuple({"run": s.run, "step": s.step, **s.facts} for s in listed),
        notes=_notes(steps, listed, bodies, max_bytes),
    )


def _read(number: int, run: Run, step: int) -> Step:
    recorded = read_step(run.trajectories, step)
    rows = rows_of(recorded)
    lines = [body_line(trajectory) for trajectory in recorded.trajectories]
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
        whole=pack(lines),
        best=pack([lines[n] for n in best]),
        best_rows=best,
    )


def _newest_rows(steps: Sequence[Step]) -> list[Step]:
    """The newest steps with at most MAX_ROWS rows together, oldest first."""
    kept: list[Step] = []
    rows = 0
    for step in reversed(steps):
        rows += len(step.rows) + len(step.replayed)
        if rows > MAX_ROWS and kept:
            break
        kept.append(step)
    return kept[::-1]


def _choose(
    steps: Sequence[Step], max_bytes: float
) -> dict[tuple[int, int], tuple[bytes, tuple[int, ...]]]:
    """For each step that has some: its packed lines, and the numbers of their rows."""
    fits = sum(len(step.whole) for step in steps) * _BASE64 <= max_bytes
    whole_bytes = max_bytes if fits else max_bytes * NEWEST_SHARE
    chosen: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
    used, is_whole = 0.0, True
    for step in reversed(steps):
        size = len(step.whole) * _BASE64
        is_whole = is_whole and used + size <= whole_bytes
        packed = step.whole if is_whole else step.best
        numbers = tuple(range(len(step.rows))) if is_whole else step.best_rows
        if used + len(packed) * _BASE64 <= max_bytes:
            used += len(packed) * _BASE64
            chosen[step.run, step.step] = (packed, numbers)
    return chosen


def _notes(
    steps: Sequence[Step], listed: Sequence[Step], bodies: int, max_bytes: float
) -> tuple[str, ...]:
    notes = []
    if len(listed) < len(steps):
        notes.append(
            f"The list begins with step {listed[0].step}: it holds {MAX_ROWS:,} rows at most. "
            f"{len(steps) - len(listed)} older recorded steps are not in it."
        )
    rows = sum(len(step.rows) for step in listed)
    if bodies < rows:
        notes.append(
            f"{rows - bodies:,} of {rows:,} listed trajectories are here without their turns, to "
            f"keep the file below its limit ({max_bytes / 1e6:.1f} MB for turns): the newest steps "
            f"are whole, of older ones the {BEST_A_STEP} of the highest reward are kept as far as "
            "they fit. --max-mb raises the limit; the run's folder has them all."
        )
    return tuple(notes)
