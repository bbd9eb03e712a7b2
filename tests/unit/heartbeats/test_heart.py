"""A rank's heart: what it writes, what counts as a movement, and when the watchdog may bite."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_heartbeat_files import heartbeat

from megatron_spear.heartbeats import heart as heartbeats
from megatron_spear.heartbeats.heart import Heart
from megatron_spear.heartbeats.record import Hang, HeartbeatFolder

PERIOD_S = 0.1


def until(condition: Callable[[], object], limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path) -> HeartbeatFolder:
    return HeartbeatFolder(tmp_path, "one")


@pytest.fixture
def make(folder: HeartbeatFolder) -> Iterator[Callable[..., Heart]]:
    """``make(rank=1, limit_s=2.0)``: a heart of two; what it ends itself with goes to ``ended``."""
    ended: list[int] = []

    def build(*, rank: int = 1, limit_s: float = 2.0, folder: Any = folder) -> Heart:
        heart = Heart(limit_s, rank=rank, world_size=2, folder=folder, end=ended.append)
        heart.ended = ended  # type: ignore[attr-defined]
        return heart

    yield build


def test_it_tells_what_the_rank_does(make: Any, folder: HeartbeatFolder) -> None:
    with make():
        heartbeats.begin("step 3")
        with heartbeats.phase("train"):
            until(lambda: (found := folder.read(1)) and found.doing == "step 3: train")
            # Where it reads its own file again and again, the place may be in there too.
            until(lambda: (found := folder.read(1)) and "test_heart.py" in found.at)
            found = folder.read(1)
            assert found is not None and not found.waits_in
            with heartbeats.waiting_for("the plan"):
                until(lambda: (found := folder.read(1)) and found.waits_in == "the plan")
        until(lambda: (found := folder.read(1)) and found.doing == "step 3" and not found.waits_in)
    found = folder.read(1)
    assert found is not None and found.ended == "well"


def test_it_tells_how_the_rank_ended(make: Any, folder: HeartbeatFolder) -> None:
    with pytest.raises(ValueError), make():
        raise ValueError("no games")
    found = folder.read(1)
    assert found is not None and found.ended == "ValueError: no games"


def test_movements_are_counted_and_beats_go_on_without_them(
    make: Any, folder: HeartbeatFolder
) -> None:
    with make():
        heartbeats.begin("step 1")
        until(lambda: (found := folder.read(1)) and found.moves)
        first = folder.read(1)
        assert first is not None
        until(lambda: (found := folder.read(1)) and found.beats > first.beats + 1)
        still = folder.read(1)
        assert still is not None and still.moves == first.moves and still.still_s > first.still_s
        heartbeats.beat()
        until(lambda: (found := folder.read(1)) and found.moves == first.moves + 1)


def test_others_threads_count_unless_the_main_thread_waits(make: Any) -> None:
    with make() as heart:
        before = heart._moves
        thread = threading.Thread(target=heartbeats.beat)
        thread.start()
        thread.join()
        assert heart._moves == before + 1
        with heartbeats.waiting_for("all ranks"):
            thread = threading.Thread(target=heartbeats.beat)
            thread.start()
            thread.join()
            assert heart._moves == before + 1


def test_a_wait_lasts_as_long_as_the_controller_moves(make: Any, folder: HeartbeatFolder) -> None:
    with make(limit_s=1.0) as heart, heartbeats.waiting_for("the controller's word"):
        for moves in range(12):
            folder.write(heartbeat(0, moves=moves, beats=moves))
            time.sleep(0.2)
        assert heart.ended == []
        for beats in range(12, 26):  # alive, but it does not move
            folder.write(heartbeat(0, moves=11, beats=beats))
            time.sleep(0.1)
        until(lambda: heart.ended)


def test_a_rank_that_works_has_its_own_limit(make: Any, folder: HeartbeatFolder) -> None:
    with make(limit_s=1.0) as heart:
        began = time.monotonic()
        moves = 0
        while not heart.ended:
            folder.write(heartbeat(0, moves=moves, beats=moves))
            moves += 1
            time.sleep(0.1)
            assert time.monotonic() - began < 10.0
    hang = folder.hang()
    assert hang is not None and (hang.rank, hang.pid) == (1, os.getpid())


def test_the_hang_of_another_ends_this_rank_at_once(make: Any, folder: HeartbeatFolder) -> None:
    with make(limit_s=60.0) as heart:
        heart.period_s = PERIOD_S
        time.sleep(0.1)
        folder.announce(Hang(rank=0, host="n1", pid=7, token="a"))
        until(lambda: heart.ended, limit_s=10.0)


def test_the_hang_of_an_earlier_launch_ends_nobody(make: Any, folder: HeartbeatFolder) -> None:
    """Where this rank is there before the controller, which removes it."""
    folder.announce(Hang(rank=0, host="n1", pid=7, token="a"))
    with make(limit_s=5.0) as heart:
        until(lambda: heart._beats > 5)
        assert heart.ended == [] and not heart.knows_of_a_hang()
        folder.begin()
        folder.announce(Hang(rank=0, host="n1", pid=7, token="b"))
        until(lambda: heart.ended)


def test_what_cannot_be_written_stops_nothing(make: Any, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "rank_1.json").mkdir()
    with make() as heart:
        until(lambda: heart._beats > 3)
        heartbeats.beat()
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


def test_a_file_system_that_stands_still_keeps_nobody(make: Any, folder: HeartbeatFolder) -> None:
    """Neither the work nor the watchdog."""

    class Stuck(HeartbeatFolder):
        def stand(self, *_: Any) -> None:
            release.wait(30.0)

        write = read = hang = announce = stand

    release = threading.Event()
    began = time.monotonic()
    try:
        with make(folder=Stuck(folder.path, "one"), limit_s=20.0):
            for _ in range(1000):
                heartbeats.beat()
        assert time.monotonic() - began < 5.0
    finally:
        release.set()


def test_without_a_heart_nothing_happens() -> None:
    heartbeats.begin("step 1")
    heartbeats.beat()
    with heartbeats.phase("train"), heartbeats.waiting_for("nobody"):
        pass


def test_a_beat_is_cheap(make: Any) -> None:
    with make(limit_s=60.0):
        began = time.perf_counter()
        for _ in range(2000):
            heartbeats.beat()
        assert time.perf_counter() - began < 1.0  # some microseconds each, on a slow machine
