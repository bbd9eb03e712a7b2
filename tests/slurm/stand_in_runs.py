"""Runs that are submitted to a Slurm by the command line; their job steps are ``stand_in.py``."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.cluster.attempt import Attempt, attempts
from megatron_spear.testing.local_slurm import LocalSlurm

QUICKSTART = Path(__file__).parents[2] / "examples" / "alfworld" / "quickstart.yaml"
STAND_IN = Path(__file__).parent / "stand_in.py"

_PYTHON = """#!/bin/bash
# -m megatron_spear.cli.main launch PHASE --attempt DIR
case "$4" in
preflight|node) exec {python} {stand_in} "$4" "$6" ;;
*) exec {python} "$@" ;;
esac
"""


@dataclass(frozen=True)
class StandInRun:
    """A run of two nodes whose job steps are ``stand_in.py``; ``job`` is its number."""

    slurm: LocalSlurm
    path: Path
    job: int

    @property
    def log(self) -> str:
        """What the job wrote."""
        return (self.path / f"job-{self.job}.log").read_text()

    @property
    def attempts(self) -> list[Attempt]:
        """Those begun so far."""
        return attempts(self.path)

    def seen(self, phase: str = "node", attempt: int = 0) -> list[dict[str, Any]]:
        """What the nodes of an attempt noted in a phase, the first node first."""
        file = self.path / "seen.jsonl"
        lines = [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []
        chosen = [x for x in lines if (x["phase"], x["attempt"]) == (phase, attempt)]
        return sorted(chosen, key=lambda line: int(line["index"]))

    def wait_for_nodes(self, phase: str = "node", attempt: int = 0) -> list[str]:
        """The names of the two nodes, once both are in this phase of an attempt."""
        self.slurm.wait_until(
            lambda: len(self.seen(phase, attempt)) == 2,
            60.0,
            f"attempt {attempt}: {phase} on two nodes; {self.path}",
        )
        return [line["node"] for line in self.seen(phase, attempt)]

    def wait_for(self, state: str) -> dict[str, str]:
        """The job once it is in this state."""
        job: dict[str, str] = self.slurm.wait_for(self.job, state, within_s=90.0)
        return job


def launch_slurm(
    slurm: LocalSlurm, run: Path, venv: Path, settings: tuple[str, ...]
) -> "subprocess.CompletedProcess[str]":
    """``megatron-spear launch slurm`` for a run of two nodes whose steps are the stand-in."""
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(_PYTHON.format(python=sys.executable, stand_in=STAND_IN))
    python.chmod(0o755)
    own = (
        "cluster.trainer_nodes=2",
        "cluster.slurm.time_limit=30",
        f"cluster.runtime.path={venv}",
        f"run.dir={run}",
    )
    command = (sys.executable, "-m", "megatron_spear.cli.main", "launch", "slurm")
    return subprocess.run(
        [*command, str(QUICKSTART), *own, *settings],
        env={**slurm.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
