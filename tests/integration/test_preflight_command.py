"""``launch preflight`` of several nodes, as processes on this machine."""

import os
import signal
import subprocess
import sys

import pytest

from megatron_spear.cluster.attempt import Attempt, bad_nodes
from megatron_spear.config.load import dump_config, load_config

_SMI = """#!/bin/sh
case $1 in
--query-gpu=*) echo '0, GPU-1, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 81004, 0' ;;
--query-remapped-rows=*) echo 'GPU-1, 0, 0' ;;
esac
"""


SETTINGS = (
    "cluster.network.address=127.0.0.1",
    "cluster.preflight.deadline_s=12",
    "cluster.preflight.min_shm_bytes=0",
    "cluster.preflight.min_disk_bytes=0",
)


@pytest.fixture
def job(tmp_path):
    """``job(nodes, settings)`` gives an attempt, and what starts ``launch preflight`` of a node."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(_SMI)
    (tools / "nvidia-smi").chmod(0o755)
    processes = []

    def make(num_nodes, *settings):
        run = tmp_path / "run"
        run.mkdir()
        own = (f"cluster.trainer_nodes={num_nodes}", f"run.dir={run}", *SETTINGS, *settings)
        (run / "config.yaml").write_text(dump_config(load_config(None, own)))
        attempt = Attempt.begin(run)

        def start(index, *, smi=True, **variables):
            environment = {
                **{name: v for name, v in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
                "PATH": f"{tools}:{os.environ['PATH']}" if smi else "/nowhere",
                "SLURM_NODEID": str(index),
                "SLURMD_NODENAME": f"n{index}",
                "SLURM_NNODES": str(num_nodes),
                "SLURM_JOB_NODELIST": f"n[0-{num_nodes - 1}]",
                **variables,
            }
            line = [sys.executable, "-m", "megatron_spear.cli.main", "launch", "preflight"]
            process = subprocess.Popen(
                [*line, "--attempt", str(attempt.path)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            processes.append(process)
            return process

        return attempt, start

    yield make
    for process in processes:
        process.kill()
        process.communicate()


def _ended(processes, limit_s=120):
    outputs = [process.communicate(timeout=limit_s)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def test_three_nodes_of_which_one_has_no_smi(job):
    attempt, start = job(3, "cluster.gpus_per_node=1")
    statuses, outputs = _ended([start(0), start(1, smi=False), start(2)])
    assert statuses == [3, 3, 3], outputs
    assert bad_nodes(attempt.run) == ["n1"]
    assert "nvidia-smi is not on this node" in outputs[0]
    assert outputs[1:] == ["", ""], "node 0 tells"


def test_three_nodes_of_which_one_is_stopped(job):
    attempt, start = job(3)
    processes = [start(index) for index in range(3)]
    os.kill(processes[2].pid, signal.SIGSTOP)
    statuses, outputs = _ended(processes[:2])
    assert statuses == [3, 3], outputs
    assert bad_nodes(attempt.run) == ["n2"]
    assert "it did not start" in outputs[0]


@pytest.mark.parametrize("variables", [{"SLURM_NNODES": "4"}, {"SLURM_NODEID": "3"}])
def test_a_job_that_does_not_fit_the_settings_is_2(job, variables):
    attempt, start = job(3)
    statuses, outputs = _ended([start(0, **variables)])
    assert statuses == [2], outputs
    assert outputs[0].startswith("error: ")
    assert not (attempt.run / "bad_nodes").exists()


def test_a_preflight_that_is_switched_off_asks_nothing(job):
    attempt, start = job(3, "cluster.preflight.enabled=false")
    statuses, outputs = _ended([start(0)])
    assert statuses == [0], outputs
    assert not (attempt.path / "preflight").exists()


@pytest.mark.parametrize(("floor", "status"), [(1, 0), (10**15, 3)])
def test_an_all_reduce_of_two_nodes(job, floor, status):
    attempt, start = job(
        2,
        f"cluster.preflight.min_allreduce_bytes_per_s={floor}",
        "cluster.preflight.deadline_s=60",
    )
    statuses, outputs = _ended([start(0), start(1)], 180)
    assert statuses == [status, status], outputs
    lines = [line for line in outputs[0].splitlines() if "GB/s or more" in line]
    marks = {line.split()[0] for line in lines}
    assert marks == {"ok" if floor == 1 else "BAD"}, outputs[0]
    # Two nodes cannot tell which of them is slow.
    assert bad_nodes(attempt.run) == []


def test_an_all_reduce_that_cannot_be_made_is_told_with_its_reason(job):
    attempt, start = job(
        2,
        "cluster.preflight.min_allreduce_bytes_per_s=1",
        "cluster.preflight.deadline_s=60",
        "cluster.network.interface=none7",
    )
    statuses, outputs = _ended([start(0), start(1)], 180)
    assert statuses == [3, 3], outputs
    assert "the all-reduce exited with 1" in outputs[0]
    assert "none7" in outputs[0]
    assert bad_nodes(attempt.run) == []
