"""Training jobs on a real Slurm of two nodes: stopped, killed, preempted, a node lost.

What the job becomes is what it becomes when nobody disturbs it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.testing.kills import (
    PROMPTS_PER_STEP,
    Killed,
    differences,
    newest_step,
    twice_or_missing,
)
from megatron_spear.testing.local_slurm import LocalSlurm, missing_programs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(missing_programs()), reason=f"Slurm is not installed: {', '.join(missing_programs())}"
    ),
]

STEPS, MANY_STEPS = 8, 50
TWO_NODES = (
    "cluster.network.address=127.0.0.1",
    "cluster.network.interface=lo",
    "cluster.slurm.time_limit=10",
    "cluster.slurm.signal_before_s=60",
    "checkpoint.every=1",
    f"run.steps={STEPS}",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    with LocalSlurm(nodes=2, grace_s=60) as cluster:  # other tests may run beside
        yield cluster


class _Job:
    """A training job submitted by ``launch slurm``."""

    def __init__(self, slurm: LocalSlurm, run: Path, *settings: str) -> None:
        self.slurm, self.run = slurm, run
        line = [sys.executable, "-m", "megatron_spear.cli.main", "launch", "slurm"]
        done = subprocess.run(
            [*line, str(run.parent / "job.yaml"), *settings, f"run.dir={run}"],
            env={**slurm.environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.number = int((run / "job_id").read_text())

    @property
    def log(self) -> str:
        """What the script and the supervisors said."""
        return "".join(path.read_text() for path in self.run.glob("job-*.log"))

    def until_step(self, step: int) -> None:
        """Wait until the run has recorded this step."""
        with self._telling():
            self.slurm.wait_until(lambda: newest_step(self.run) >= step, 240, f"step {step}")

    def until_again(self, restarts: int) -> None:
        """Wait until it has been requeued for the given time, and let it begin."""
        with self._telling():
            self.slurm.start_again(self.number, restart=restarts, within_s=120)

    def until_completed(self) -> None:
        """Wait for its end."""
        with self._telling():
            self.slurm.wait_for(self.number, "COMPLETED", within_s=300)

    def pids(self, attempt: int, node: str) -> dict[str, int]:
        """Processes that a supervisor started, by role and number."""
        files = (self.run / f"attempt_{attempt}" / "pids" / node).glob("*.json")
        return {file.stem: json.loads(file.read_text())["pid"] for file in files}

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.slurm.job(self.number)}\n{self.log}") from error


@pytest.fixture
def submitted(slurm: LocalSlurm, tmp_path: Path) -> Iterator[Callable[..., _Job]]:
    jobs: list[_Job] = []

    def submit(*settings: str) -> _Job:
        (tmp_path / "job.yaml").write_text("{}\n")
        jobs.append(_Job(slurm, tmp_path / "run", *settings))
        return jobs[-1]

    yield submit
    for job in jobs:
        slurm.call("scancel", str(job.number), check=False)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_job_that_is_stopped_killed_preempted_and_loses_a_node_is_the_job_left_alone(
    slurm: LocalSlurm, submitted: Callable[..., _Job], tmp_path: Path
) -> None:
    settings = (*TWO_NODES, "cluster.trainer_nodes=2", "run.steps=10")
    alone = Killed(settings, tmp_path / "left", cache=tmp_path / "cache", seed=3)
    expected = alone.left_alone_on(2)
    job = submitted(*alone.arguments)

    job.until_step(2)  # Slurm's word that the time is nearly over
    slurm.call("scancel", "--batch", "--signal=USR1", str(job.number))
    job.until_again(1)
    assert "SIGUSR1: the ranks save and stop after this step" in job.log
    stopped = json.loads((job.run / "attempt_0" / "stopped.json").read_text())
    assert stopped["step"] == newest_step(job.run)

    job.until_step(stopped["step"] + 1)
    (rank,) = _children(job.pids(1, "n2")["trainer_1"])
    os.kill(rank, signal.SIGKILL)
    job.until_again(2)
    assert "attempt 1: again: crashed with status" in job.log

    job.until_step(newest_step(job.run) + 1)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\n#SBATCH -p urgent -N 2 --exclusive -o /dev/null\nsleep 1\n")
    slurm.wait_for(slurm.submit(urgent), "COMPLETED", within_s=120)
    job.until_again(3)
    assert (job.run / "attempt_2" / "stopped.json").is_file(), "it had time to save"

    job.until_step(newest_step(job.run) + 1)
    slurm.lose_node("n2")
    slurm.wait_until(lambda: slurm.job(job.number)["JobState"] == "PENDING", 60, "n2 is lost")
    slurm.bring_back("n2")
    job.until_again(4)

    job.until_completed()
    assert (job.run / "summary.json").is_file()
    assert differences(expected, job.run) == []
    assert twice_or_missing(job.run, PROMPTS_PER_STEP) == []
    ends = [json.loads(f.read_text())["verdict"] for f in sorted(job.run.glob("*/ended.json"))]
    assert ends[-1] == "done" and set(ends[:-1]) == {"again"}


def test_an_engine_that_is_killed_comes_back_and_the_job_ends_well(
    slurm: LocalSlurm, submitted: Callable[..., _Job], tmp_path: Path
) -> None:
    """One node trains, the other has two servers; one of them dies in the middle."""
    job = submitted(
        *Killed((), tmp_path / "unused", cache=tmp_path / "cache", seed=4).arguments,
        *TWO_NODES,
        "cluster.engine_nodes=1",
        "cluster.servers.count=2",
        "rollout.engine=sglang",
        f"run.steps={MANY_STEPS}",  # it comes back before the last
    )
    job.until_step(2)
    killed = job.pids(0, "n2")["engine_1"]
    os.kill(killed, signal.SIGKILL)
    job.until_completed()
    assert "engine 1 ended by SIGKILL" in job.log
    assert "engine 1 started again (restart 1)" in job.log
    records = _records(job.run)
    assert sorted(records) == list(range(1, MANY_STEPS + 1))
    assert all(record["rollout/failed"] == 0 for record in records.values()), "drawn elsewhere"
    assert twice_or_missing(job.run, PROMPTS_PER_STEP) == []
    trainer = (job.run / "attempt_0" / "log" / "n1" / "trainer_0.log").read_text()
    assert "joins" in trainer and "== Export" in trainer
    assert not any(Path(f"/proc/{pid}").exists() for pid in job.pids(0, "n2").values())


def _records(run: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "rollout/failed" in line}
