"""A real Slurm on loopback."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stand_in_runs import StandInRun, launch_slurm

from megatron_spear.testing.local_slurm import LocalSlurm, missing_programs


@pytest.fixture(scope="session")
def _local_slurm() -> Iterator[LocalSlurm]:
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)}")
    with LocalSlurm(nodes=4) as slurm:
        yield slurm


@pytest.fixture
def slurm(_local_slurm: LocalSlurm) -> Iterator[LocalSlurm]:
    """A cluster of four idle nodes, n1 to n4, with a partition ``urgent`` that preempts."""
    yield _local_slurm
    _local_slurm.clear()


@pytest.fixture
def launch(slurm: LocalSlurm, tmp_path: Path) -> Callable[..., StandInRun]:
    """Submits a run of two nodes with a plan (an entry an attempt) and further settings."""

    def start(
        *plan: dict[str, str], name: str = "run", settings: tuple[str, ...] = ()
    ) -> StandInRun:
        run = tmp_path / name
        done = launch_slurm(slurm, run, tmp_path / "venv", settings)
        assert done.returncode == 0, done.stderr
        job = int((run / "job_id").read_text())
        (run / "plan.json").write_text(json.dumps(plan or [{}]))
        return StandInRun(slurm, run, job)

    return start
