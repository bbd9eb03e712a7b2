"""``launch local`` with the real job: engines that die, ranks that die, stops; nothing is left."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import arguments

from megatron_spear.cluster.attempt import Attempt, attempts
from megatron_spear.cluster.processes import children_of, descendants, process_table
from megatron_spear.cluster.registry import Registration, registrations

pytestmark = pytest.mark.timeout(300)

SETTINGS = ("policy.optimizer.lr=0.002", "cluster.ranks_per_node=2", "evaluation.games=2")
ENGINES = ("rollout.engine=sglang", "cluster.servers.count=2")
LONG = ("run.steps=200", "checkpoint.every=0")
Records = Callable[[Path], dict[int, dict[str, Any]]]


@pytest.fixture
def launched(launch_command: Callable[[list[str]], Any], cache: Path) -> Callable[..., Any]:
    """``launched("run.dir=...")``: ``launch local`` as a process of its own."""

    def start(*settings: str) -> Any:
        words = arguments("local", cache, (*SETTINGS, *settings))
        return launch_command([sys.executable, "-m", "megatron_spear.cli.main", "launch", *words])

    return start


def attempt_of(run_dir: Path, number: int = 0) -> Attempt:
    return Attempt(run_dir / f"attempt_{number}")


def engines(run_dir: Path) -> list[Registration]:
    return registrations(attempt_of(run_dir).registry, "engine")


def num_steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("rollout/num_trajectories") if metrics.exists() else 0


def until(condition: Callable[[], object], launched: Any, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        told = launched.out + launched.err
        assert launched.process.poll() is None, told
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def started_by(pid: int) -> set[int]:
    """All live processes that a launch has started."""
    table = process_table()
    return {p for p in descendants([pid], table) if not table[p].is_zombie}


def assert_gone(pids: set[int], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while left := [p for p, e in process_table().items() if p in pids and not e.is_zombie]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def test_an_engine_that_is_killed_comes_back_and_a_stop_saves_the_run(
    launched: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    job = launched(f"run.dir={run_dir}", *ENGINES, *LONG)
    until(lambda: num_steps(run_dir) >= 1, job)
    before = {found.index: found for found in engines(run_dir)}
    assert sorted(before) == [0, 1]
    os.kill(before[1].pid, signal.SIGKILL)
    until(lambda: [e for e in engines(run_dir) if e.launch == 1], job)
    after = {found.index: found for found in engines(run_dir)}
    assert after[0] == before[0]
    assert after[1].address != before[1].address
    steps = num_steps(run_dir)
    until(lambda: num_steps(run_dir) >= steps + 3, job)
    alive = started_by(job.process.pid)
    assert len(alive) >= 5, "torchrun, two ranks and two engines at the least"

    os.kill(job.process.pid, signal.SIGUSR1)
    done = job.wait(90)
    assert done.status == 130, done.out + done.err
    assert f"go on with: megatron-spear launch local resume={run_dir}" in done.out
    records = training_records(run_dir)
    told = json.loads(attempt_of(run_dir).stopped_file.read_text())
    assert told["step"] == max(records)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step_{max(records)}"]
    served = [record["weight_sync/num_servers"] for record in records.values()]
    assert (served[0], min(served), served[-1]) == (2, 1, 2), "lost, and taken in again"
    assert all(record["rollout/failed"] == 0 for record in records.values())
    log = attempt_of(run_dir).log(after[1].node, "trainer", 0).read_text()
    assert f"engine {after[1].address} joins" in log
    assert f"engine {before[1].address} is forgotten" in log
    assert_gone(alive)


def test_a_rank_that_is_killed_costs_an_attempt_and_changes_no_number(
    launched: Callable[..., Any], tmp_path: Path, on_ranks: Callable[..., Any], same_run: Any
) -> None:
    steps = ("run.steps=4", "checkpoint.every=1")
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    job = launched(f"run.dir={run_dir}", *steps)
    until(lambda: (run_dir / "checkpoints" / "step_1").exists(), job)
    (torchrun,) = children_of(job.process.pid)
    alive = started_by(job.process.pid)
    os.kill(children_of(torchrun)[-1], signal.SIGKILL)
    done = job.wait(150)
    assert done.status == 0, done.out + done.err
    assert len(attempts(run_dir)) == 2
    assert "attempt 0: crashed with status 1" in done.out
    assert_gone(alive)
    on_ranks(2, f"run.dir={whole}", *SETTINGS, *steps)
    same_run(whole, run_dir)


def test_an_environment_worker_that_is_killed_comes_back(
    launched: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    """Worker 0 is lost in the middle of the run: at most one trajectory failed by that, and none
    where it was between two calls."""

    def workers() -> dict[int, Registration]:
        found = registrations(attempt_of(run_dir).registry, "environment")
        return {registration.index: registration for registration in found}

    run_dir = tmp_path / "run"
    job = launched(f"run.dir={run_dir}", "cluster.env_workers=2", "run.steps=12")
    until(lambda: num_steps(run_dir) >= 1, job)
    before = workers()
    assert sorted(before) == [0, 1]
    alive = started_by(job.process.pid)
    os.kill(before[0].pid, signal.SIGKILL)
    until(lambda: (worker := workers().get(0)) and worker.launch == 1, job)
    done = job.wait(150)
    assert done.status == 0, done.out + done.err
    records = training_records(run_dir)
    assert sum(record["rollout/failed"] for record in records.values()) <= 1
    assert sorted(records) == list(range(1, 13))
    log = attempt_of(run_dir).log(before[0].node, "environment", 0).read_text()
    assert log.count("worker ") >= 2, "a worker for the run, another after the restart"
    assert_gone(alive)


def test_a_stop_before_the_servers_are_there_is_a_stop_of_all_ranks(
    launched: Callable[..., Any], tmp_path: Path
) -> None:
    """The servers cannot start: their Python is missing."""
    run_dir = tmp_path / "run"
    job = launched(f"run.dir={run_dir}", *ENGINES, "cluster.servers.python=/no/such/python")
    until(lambda: "engine 0 cannot be started" in job.out, job)
    os.kill(job.process.pid, signal.SIGTERM)
    done = job.wait(60)
    assert done.status == 130, done.out + done.err
    told = json.loads(attempt_of(run_dir).stopped_file.read_text())
    assert told["step"] == 0
    assert "while engine servers were starting" in told["reason"]


def test_nothing_is_left_when_the_launch_itself_is_killed(
    launched: Callable[..., Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = launched(f"run.dir={run_dir}", *ENGINES, *LONG)
    until(lambda: num_steps(run_dir) >= 1, job)
    alive = started_by(job.process.pid)
    os.kill(job.process.pid, signal.SIGKILL)
    assert_gone(alive)


def test_settings_that_only_the_job_can_refuse_are_not_tried_again(
    launched: Callable[..., Any], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = launched(f"run.dir={run_dir}", f"env.games={tmp_path / 'missing'}")
    done = job.wait(60)
    assert done.status == 2, done.out + done.err
    assert len(attempts(run_dir)) == 1
    assert "no restart would mend this" in done.out
    assert "Traceback" not in done.out
