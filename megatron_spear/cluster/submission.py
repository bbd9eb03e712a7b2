"""Hands the job script of a run to Slurm, once."""

import subprocess
from pathlib import Path

from megatron_spear.cluster.slurm import SCRIPT_NAME
from megatron_spear.errors import ConfigError
from megatron_spear.files import write_whole

JOB_NAME = "job_id"
"""File in a run directory: the number of the job that was submitted last."""

_ANSWER_S = 120.0


def submit(run: Path) -> str:
    """Submit ``RUN/job.sbatch``; the number of the job, which is noted in the run directory.

    Raises ConfigError with sbatch's complaint where it refuses, is missing or gives no answer.
    """
    script = run / SCRIPT_NAME
    try:
        done = _ask("sbatch", "--parsable", str(script))
    except FileNotFoundError:
        raise ConfigError(
            f"sbatch is not on this machine; submit {script} from a login node of the cluster, or "
            "use `megatron-spear launch local`"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"sbatch did not answer within {_ANSWER_S:g} s; is slurmctld up? See with squeue "
            f"whether the job is there, else submit {script}"
        ) from None
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    write_whole(run / JOB_NAME, job + "\n")
    return job


def refuse_second_job(run: Path) -> None:
    """Raise ConfigError if the last job of this run still waits or runs."""
    file = run / JOB_NAME
    if not file.is_file():
        return
    job = file.read_text(encoding="utf-8").strip()
    try:
        done = _ask("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return  # sbatch will say so
    state = done.stdout.strip()
    if not done.returncode and state:  # of a job that is long gone, squeue knows nothing
        raise ConfigError(
            f"{run}: its job {job} is {state}; wait for it or end it (scancel {job}) first"
        )


def _ask(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
