"""A rank that hangs, is stopped or is killed: the others end soon and say which, and where."""

import os
import re
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.deadlines import HANG_EXIT_CODE
from megatron_spear.heartbeats.place import place_of
from megatron_spear.testing.faults import KILLED, Rank, ranks_that_may_fail, sleep_for_ever
from megatron_spear.testing.ranks import run_ranks

LIMIT_S = 3.0
OVER_S = 60.0
"""What an expired watchdog may take, by the project's promise."""
STARTED_S = 60.0
LONG_ROLLOUTS = ("long rollouts", "sleeps meanwhile")
"""Those of step 2 take twice the limit, and move."""


def train(folder: Path, fault: str, culprit: int, limit_s: float = LIMIT_S) -> None:
    """A loop as the trainer's: rollouts on rank 0, then a collective of all."""
    import torch
    import torch.distributed as dist

    from megatron_spear.heartbeats.heart import beat, begin, phase
    from megatron_spear.trainer.ranks import broadcast
    from megatron_spear.trainer.watch import COLLECTIVE_LIMIT_S, watched

    with watched(limit_s, folder):
        dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_LIMIT_S))
        for step in (1, 2, 3):
            begin(f"step {step}")
            hit = (step, dist.get_rank()) == (2, culprit)
            if dist.get_rank() == 0:
                with phase("rollout"):
                    for _ in range(8 if fault in LONG_ROLLOUTS and step == 2 else 0):
                        time.sleep(limit_s / 4)
                        beat()
            if hit and fault == "sleeps meanwhile":
                end_by("sleeps")
            broadcast(step)
            if hit:
                end_by(fault)
            with phase("train"):
                dist.all_reduce(torch.ones(4))
        os.write(2, b"done\n")
        dist.destroy_process_group()


def end_by(fault: str) -> None:
    time.sleep(2.5)  # so that its heartbeat tells of this step
    os.write(2, b"now\n")
    if fault == "sleeps":
        sleep_for_ever()
    elif fault == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)


def expired(rank: Rank) -> None:
    """The rank ended as hung, with the stacks of its threads."""
    assert rank.status == HANG_EXIT_CODE, (rank.status, rank.err)
    assert "stacks of all threads follow" in rank.err
    assert "most recent call first" in rank.err
    assert "in train" in rank.err.partition("most recent call first")[2]


@pytest.mark.parametrize(("world_size", "culprit"), [(2, 0), (4, 1)])
def test_a_rank_that_sleeps_is_named_by_all(world_size: int, culprit: int, tmp_path: Path) -> None:
    with ranks_that_may_fail(
        train, world_size, tmp_path / "log", tmp_path / "hb", "sleeps", culprit
    ) as ranks:
        ranks[culprit].until_it_says("now", STARTED_S)
        began = time.monotonic()
        for rank in ranks:
            rank.wait(LIMIT_S + OVER_S)
        assert time.monotonic() - began < LIMIT_S + OVER_S
    for rank in ranks:
        expired(rank)
        assert re.search(
            rf"watchdog: rank {culprit} on \S+ \(pid \d+\) holds the others up; it has not moved "
            rf"for \d+ s: step 2, at faults.py:\d+ in sleep_for_ever",
            rank.err,
        ), rank.err
    assert "in end_by" in ranks[culprit].err
    others = [r for r in range(world_size) if r != culprit]
    names = "rank 1 waits" if others == [1] else "ranks 0, 2, 3 wait"
    assert f"watchdog: {names} in: step 2: train, all_reduce at test_hangs.py" in ranks[0].err


def test_a_rank_that_is_stopped_is_named_by_the_others(tmp_path: Path) -> None:
    with ranks_that_may_fail(train, 2, tmp_path / "log", tmp_path / "hb", "stops", 1) as ranks:
        ranks[1].until_it_says("now", STARTED_S)
        assert ranks[0].wait(LIMIT_S + OVER_S) is not None
        expired(ranks[0])
        assert ranks[1].status is None
        assert re.search(
            r"watchdog: rank 1 on \S+ \(pid \d+\) does not answer: its process is stopped "
            r"\(SIGSTOP\); last seen in: step 2",
            ranks[0].err,
        ), ranks[0].err
        ranks[1].signal(signal.SIGCONT)  # it does not go on alone for ever
        assert ranks[1].wait(LIMIT_S + OVER_S) in (1, HANG_EXIT_CODE)


def test_a_rank_that_is_killed_is_named_by_the_others(tmp_path: Path) -> None:
    with ranks_that_may_fail(
        train, 3, tmp_path / "log", tmp_path / "hb", "is killed", 1, 60.0
    ) as ranks:
        ranks[1].until_it_says("now", STARTED_S)
        for rank in ranks:
            rank.wait(30.0)
        assert [rank.status for rank in ranks] == [1, KILLED, 1]
    told = (
        r"PeerLost: rank \d ends because the ranks are not all there: .*rank 1 on \S+ "
        r"\(pid \d+\) has ended: its process is gone \(killed, or a crash\); last seen in: step 2"
    )
    assert all(re.search(told, ranks[r].err) for r in (0, 2)), ranks[0].err + ranks[2].err


def test_ranks_wait_on_while_the_controller_moves(tmp_path: Path) -> None:
    """Rollouts of twice the limit: nobody expires."""
    with ranks_that_may_fail(
        train, 2, tmp_path / "log", tmp_path / "hb", "long rollouts", -1
    ) as ranks:
        for rank in ranks:
            assert rank.wait(STARTED_S) == 0, rank.err
            assert "done" in rank.err


def test_a_rank_that_does_not_even_wait_is_found_in_the_rollouts(tmp_path: Path) -> None:
    """The controller moves, but rank 1 is in no collective: nothing excuses it."""
    with ranks_that_may_fail(
        train, 2, tmp_path / "log", tmp_path / "hb", "sleeps meanwhile", 1
    ) as ranks:
        ranks[1].until_it_says("now", STARTED_S)
        for rank in ranks:
            rank.wait(LIMIT_S + OVER_S)
    for rank in ranks:
        expired(rank)
    assert "watchdog: the watchdog of rank 1 (pid" in ranks[0].err
    named = r"watchdog: rank 1 on \S+ \(pid \d+\) has not moved for \d+ s: .* in sleep_for_ever"
    assert re.search(named, ranks[0].err) and re.search(named, ranks[1].err), ranks[0].err


def fail_late(folder: Path) -> None:
    """Rank 0 waits for one that does not come, with a collective's deadline before the watchdog."""
    import torch
    import torch.distributed as dist

    from megatron_spear.heartbeats.heart import begin
    from megatron_spear.trainer.watch import watched

    with watched(60.0, folder):
        dist.init_process_group("gloo", timeout=timedelta(seconds=2.0))
        dist.all_reduce(torch.ones(4))
        begin("step 1")
        if dist.get_rank():
            time.sleep(60.0)
        dist.all_reduce(torch.ones(4))


def test_a_collectives_own_timeout_is_told_as_the_hang_it_is(tmp_path: Path) -> None:
    with ranks_that_may_fail(fail_late, 2, tmp_path / "log", tmp_path / "hb") as ranks:
        assert ranks[0].wait(STARTED_S) == HANG_EXIT_CODE, ranks[0].err
    assert "Timed out waiting" in ranks[0].err
    assert re.search(r"watchdog: rank 1 on \S+ \(pid \d+\) .*: step 1, at test_hangs", ranks[0].err)


def waits() -> list[tuple[str, str]]:
    """Rank 0's places while rank 1 lets it wait in one collective after the other."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    places, main = [], threading.get_ident()

    def look() -> None:
        time.sleep(0.5)
        found = place_of(main)
        places.append((found.waits_in, found.at.partition(" in ")[2]))

    def all_reduce() -> None:
        dist.all_reduce(torch.ones(1))

    def broadcast_object() -> None:
        dist.broadcast_object_list([None], src=1)

    def handle() -> None:
        work: Any = dist.all_reduce(torch.ones(1), async_op=True)
        work.wait()

    for collective in (all_reduce, broadcast_object, handle):
        if dist.get_rank() == 0:
            watcher = threading.Thread(target=look)
            watcher.start()
            collective()
            watcher.join()
        else:
            time.sleep(1.0)
            collective()
    dist.destroy_process_group()
    return places


def test_collectives_are_known_by_name() -> None:
    places, others = run_ranks(waits, 2)
    assert others == []
    assert places[:2] == [
        ("all_reduce", "all_reduce"), ("broadcast_object_list", "broadcast_object")
    ]  # fmt: skip
    # In a user's own line nothing tells a transfer; in torch's and Megatron's the text does.
    assert places[2] == ("", "handle")
