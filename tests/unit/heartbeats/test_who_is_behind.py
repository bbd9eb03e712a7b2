"""From two looks at the heartbeats to the rank that holds the others up."""

import os
import subprocess
import sys
from dataclasses import replace

from test_heartbeat_files import heartbeat

from megatron_spear.heartbeats.record import Heartbeat
from megatron_spear.heartbeats.report import Looks, who_is_behind, who_is_lost


def rank(number: int, *, waits: str = "", still_s: float = 60.4, **fields: object) -> Heartbeat:
    return heartbeat(
        number, still_s=still_s, doing="step 3: train", at=f"loop.py:{number % 2} in run",
        waits_in=waits, **fields,
    )  # fmt: skip


def looks(*beats: Heartbeat, silent: tuple[int, ...] = (), world_size: int = 0) -> Looks:
    second = {b.rank: b if b.rank in silent else replace(b, beats=b.beats + 2) for b in beats}
    return Looks(
        world_size=world_size or len(beats),
        host="n1",
        first={b.rank: b for b in beats},
        second=second,
    )


def test_the_one_that_does_not_wait_is_named_and_the_others_by_place() -> None:
    all_reduce = [rank(n, waits="all_reduce") for n in (0, 2, 4, 6)]
    seen = looks(rank(1), rank(3, waits="broadcast"), *all_reduce, rank(5, waits="broadcast"))
    assert who_is_behind(seen) == [
        "rank 1 on n2 (pid 4711) holds the others up; it has not moved for 60 s: step 3: train, at "
        "loop.py:1 in run",
        "ranks 0, 2, 4, 6 wait in: step 3: train, all_reduce at loop.py:0 in run",
        "ranks 3, 5 wait in: step 3: train, broadcast at loop.py:1 in run",
    ]


def test_one_that_does_not_answer_is_named_before_one_that_works() -> None:
    lines = who_is_behind(looks(rank(0, waits="recv"), rank(1), rank(2), silent=(2,)))
    assert lines[0] == (
        "rank 2 on n2 (pid 4711) does not answer: it is stopped, or its machine is cut off or "
        "gone; last seen in: step 3: train, at loop.py:0 in run"
    )
    assert lines[1].startswith("rank 1 on n2 (pid 4711) works; it has not moved for 60 s")
    assert lines[2].startswith("rank 0 waits in: step 3: train, recv")


def test_processes_of_this_machine_are_looked_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    here = {"host": "n1"}
    gone = rank(0, pid=child.pid, **here)
    alive = rank(1, pid=os.getpid(), **here)
    assert who_is_lost(looks(gone, alive, silent=(0, 1))) == [
        f"rank 0 on n1 (pid {child.pid}) has ended: its process is gone (killed, or a crash); last "
        "seen in: step 3: train, at loop.py:0 in run",
        f"rank 1 on n1 (pid {os.getpid()}) does not answer: its process is there but does nothing; "
        "last seen in: step 3: train, at loop.py:1 in run",
    ]
    assert who_is_lost(looks(gone, alive)) == []  # heartbeats count, not numbers of processes


def test_how_a_rank_ended_is_its_own_word() -> None:
    lines = who_is_lost(looks(rank(0), rank(1, ended="DataError: no games"), silent=(1,)))
    assert lines == ["rank 1 on n2 (pid 4711) has ended: DataError: no games"]


def test_ranks_that_never_came_are_counted_together() -> None:
    lines = who_is_behind(looks(rank(0, waits="init_process_group"), world_size=7))
    assert lines[0] == "ranks 1-6 did not start (no heartbeat in this launch)"
    assert lines[1].startswith("rank 0 waits in: step 3: train, init_process_group")


def test_when_all_wait_that_is_said() -> None:
    lines = who_is_behind(looks(rank(0, waits="all_reduce"), rank(1, waits="broadcast")))
    assert len(lines) == 3 and lines[-1].startswith("all ranks wait: ")


def test_when_nobody_waits_all_are_shown() -> None:
    lines = who_is_behind(looks(rank(0), rank(1)))
    assert [line.split(" has not moved")[0] for line in lines] == [
        "rank 0 on n2 (pid 4711)", "rank 1 on n2 (pid 4711)",
    ]  # fmt: skip


def test_a_large_world_is_told_in_few_lines() -> None:
    beats = [rank(n) if n < 500 else rank(n, waits="all_reduce") for n in range(1024)]
    lines = who_is_behind(looks(*beats))
    assert len(lines) == 11
    assert lines[8] == "and 492 more ranks like these"
    assert lines[9].startswith("262 ranks (500, 502, 504, 506, 508, 510, 512, 514 and so on) wait")
