"""Reading everybody's heartbeat, in bounded time: the file system may stand still too."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from megatron_spear.heartbeats.record import Heartbeat, HeartbeatFolder
from megatron_spear.heartbeats.report import Looks

LOOK_S = 5.0
"""Longest reading of all heartbeats, twice a report."""


def look_twice(
    folder: HeartbeatFolder,
    *,
    rank: int,
    world_size: int,
    host: str,
    gap_s: float,
    expired: int | None,
) -> Looks:
    """What ``rank`` sees of all ranks, ``gap_s`` seconds apart; see ``Looks`` for the rest."""
    first = _look(folder, rank, world_size)
    time.sleep(gap_s)
    second = _look(folder, rank, world_size)
    return Looks(world_size=world_size, host=host, first=first, second=second, expired=expired)


def within(limit_s: float, work: Callable[[], object]) -> None:
    """Do this in a thread that is left behind when it takes too long; errors of files are
    nobody's."""
    done: Future[None] = Future()

    def run() -> None:
        with contextlib.suppress(OSError):
            work()
        done.set_result(None)

    threading.Thread(target=run, name="heartbeat-look", daemon=True).start()
    with contextlib.suppress(TimeoutError):
        done.result(limit_s)


def _look(folder: HeartbeatFolder, rank: int, world_size: int) -> dict[int, Heartbeat]:
    found: dict[int, Heartbeat] = {}
    until = time.monotonic() + LOOK_S

    def read() -> None:
        for offset in range(world_size):  # not all ranks read the same file first
            other = (rank + offset) % world_size
            beat = folder.read(other) if time.monotonic() < until else None
            if beat is not None:
                found[other] = beat

    within(LOOK_S, read)
    return dict(found)
