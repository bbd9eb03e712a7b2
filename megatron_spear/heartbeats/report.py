"""Who holds a run up, in words, from two looks at the ranks' heartbeats.

Of ranks that wait for each other in a collective, the one to look at is the one that is not there:
its process is gone or stands still, or it does something else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_spear.heartbeats.record import Heartbeat

_MAX_NAMED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Looks:
    """What one rank saw of all: ``first`` and, some beats later, ``second``.

    ``host`` is the reader's, whose processes it can look for; ``expired`` the rank whose watchdog
    expired first, if one has.
    """

    world_size: int
    host: str
    first: Mapping[int, Heartbeat]
    second: Mapping[int, Heartbeat]
    expired: int | None = None

    @property
    def missing(self) -> list[int]:
        """Ranks that wrote nothing in this launch."""
        return [rank for rank in range(self.world_size) if rank not in self.second]

    @property
    def ended(self) -> list[int]:
        """Ranks that said how they ended, and silent ones whose process is gone."""
        return [
            rank
            for rank, beat in self.second.items()
            if beat.ended or (self._is_silent(beat) and self.state(rank) in ("gone", "Z", "X"))
        ]

    @property
    def silent(self) -> list[int]:
        """Other ranks that wrote nothing between the looks: stopped, cut off, or their machine is
        gone."""
        gone = set(self.ended)
        return [r for r, beat in self.second.items() if r not in gone and self._is_silent(beat)]

    def state(self, rank: int) -> str:
        """The letter Linux has for a process of this machine (``T``: stopped), ``gone``; empty for
        another machine's."""
        beat = self.second[rank]
        if beat.host != self.host:
            return ""
        try:
            text = Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return "gone"
        return text.rpartition(")")[2].split()[0]

    def _is_silent(self, beat: Heartbeat) -> bool:
        return beat.rank in self.first and self.first[beat.rank].beats == beat.beats


def who_is_behind(looks: Looks) -> list[str]:
    """Lines that name the ranks that hold up the others, and where the others wait.

    Example: ``rank 1 on n2 (pid 4711) holds the others up; it has not moved for 61 s: step 3:
    train, user_hook.py:12 in on_step_end`` and ``ranks 0, 2, 3 wait in all_reduce at ...``.
    """
    lost = who_is_lost(looks)
    answering = _answering(looks)
    busy = [beat for beat in answering if not beat.waits_in]
    waiting = [beat for beat in answering if beat.waits_in]
    lines = list(lost)
    if waiting or lost:
        lines += _few(
            [
                f"{beat.name} {'holds the others up' if waiting and not lost else 'works'}; it has "
                f"not moved for {beat.still_s:.0f} s: {beat.where}"
                for beat in sorted(busy, key=lambda beat: -beat.still_s)
            ],
            "ranks",
        )
    elif len(answering) > 1:
        lines += _few([_standing(beat) for beat in answering], "ranks")
    lines += _waits(waiting)
    if waiting and not busy and not lost:
        lines.append(
            "all ranks wait: for a message that got lost on the way, or they are in collectives "
            "that do not belong together"
        )
    return lines


def who_is_lost(looks: Looks) -> list[str]:
    """Lines that name the ranks that are not there any more, or never were."""
    lines = [f"{looks.second[rank].name} has ended: {_end(looks, rank)}" for rank in looks.ended]
    lines += [
        f"{looks.second[rank].name} does not answer: {_silence(looks, rank)}; last seen in: "
        f"{looks.second[rank].where}"
        for rank in looks.silent
    ]
    if looks.missing:
        lines.append(f"{_ranks(looks.missing)} did not start (no heartbeat in this launch)")
    return _few(lines, "lines")


def _answering(looks: Looks) -> list[Heartbeat]:
    lost = {*looks.ended, *looks.silent}
    return [beat for rank, beat in sorted(looks.second.items()) if rank not in lost]


def _end(looks: Looks, rank: int) -> str:
    beat = looks.second[rank]
    why = "its watchdog expired" if rank == looks.expired else "killed, or a crash"
    return beat.ended or f"its process is gone ({why}); last seen in: {beat.where}"


def _silence(looks: Looks, rank: int) -> str:
    state = looks.state(rank)
    if state == "T":
        return "its process is stopped (SIGSTOP)"
    if state:
        return "its process is there but does nothing"
    return "it is stopped, or its machine is cut off or gone"


def _standing(beat: Heartbeat) -> str:
    return f"{beat.name} has not moved for {beat.still_s:.0f} s: {beat.where}"


def _waits(waiting: Sequence[Heartbeat]) -> list[str]:
    """One line for all ranks that wait at the same place."""
    places: dict[str, list[int]] = {}
    for beat in waiting:
        places.setdefault(beat.where, []).append(beat.rank)
    lines = [
        f"{_ranks(ranks)} {'wait' if len(ranks) > 1 else 'waits'} in: {where}"
        for where, ranks in places.items()
    ]
    return _few([line.replace(", waits in ", ", ") for line in lines], "places")


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 1``, or ``ranks 0, 2, 5-9`` with runs of neighbours drawn together."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    single = len(runs) == 1 and len(runs[0]) == 1
    if len(parts) > _MAX_NAMED:
        count = sum(map(len, runs))
        return f"{count} ranks ({', '.join(parts[:_MAX_NAMED])} and so on)"
    return f"{'rank' if single else 'ranks'} {', '.join(parts)}"


def _few(lines: Sequence[str], what: str) -> list[str]:
    if len(lines) <= _MAX_NAMED:
        return list(lines)
    return [*lines[:_MAX_NAMED], f"and {len(lines) - _MAX_NAMED} more {what} like these"]
