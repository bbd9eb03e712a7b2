"""The job script on a real Slurm: ends, stops, crashes, bad nodes. Its steps are a stand-in."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in_runs import StandInRun, launch_slurm

from megatron_spear.testing.local_slurm import LocalSlurm

pytestmark = pytest.mark.slurm

Launch = Callable[..., StandInRun]


def test_a_run_to_its_end_with_names_of_all_kinds(launch: Launch) -> None:
    run = launch(
        name='it\'s a "50%j" $HOME',
        settings=(
            'run.name=a "run" of $5, it\'s',
            "cluster.network.environment={QUOTED: '$x \"y\" `z` it''s'}",
            "cluster.slurm.options=[--comment=hello]",
            "cluster.slurm.exclude=[n1]",
        ),
    )
    job = run.wait_for("COMPLETED")
    assert job["NumNodes"] == "2" and job["ExcNodeList"] == "n1" and job["Comment"] == "hello"
    assert [len(run.seen(phase)) for phase in ("preflight", "node")] == [2, 2]
    assert {line["quoted"] for line in run.seen()} == {'$x "y" `z` it\'s'}
    assert "attempt 0: done" in run.log
    name = run.slurm.call("squeue", "--all", "-h", "-t", "all", "-j", str(run.job), "-o", "%j")
    assert re.fullmatch(r"a \"run\" of \$5, it's-[0-9a-f]{6}\n", name)


def test_a_run_that_is_stopped_in_time_is_requeued_and_goes_on(launch: Launch) -> None:
    run = launch({"node": "wait"}, {})
    run.wait_for_nodes()
    run.slurm.call("scancel", "--batch", "--signal=USR1", str(run.job))  # as Slurm's --signal=B:
    run.slurm.start_again(run.job)
    run.wait_for("COMPLETED")
    assert "attempt 0: again: stopped by SIGUSR1, saved after step 1" in run.log
    assert "attempt 1: done: all trainer nodes have ended well, at step 1" in run.log


def test_a_signal_before_the_run_has_begun_is_a_stop(launch: Launch) -> None:
    run = launch({"preflight": "wait"}, {})
    run.wait_for_nodes("preflight")
    run.slurm.call("scancel", "--batch", "--signal=USR1", str(run.job))
    run.slurm.start_again(run.job)
    run.wait_for("COMPLETED")
    assert "attempt 0: again: stopped by USR1 before it began" in run.log
    assert not run.seen("node", 0) and run.seen("node", 1)


def test_an_urgent_job_takes_the_nodes_and_the_run_goes_on_after_it(
    launch: Launch, tmp_path: Path
) -> None:
    run = launch({"node": "wait"}, {})
    run.wait_for_nodes()
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\nsleep 1\n")
    urgent = run.slurm.submit(script, "--partition=urgent", "--nodes=4", "--exclusive")
    run.slurm.wait_for(urgent, "COMPLETED", within_s=90.0)
    run.slurm.start_again(run.job)
    run.wait_for("COMPLETED")
    assert re.search(r"attempt 0: again: stopped by SIG(USR1|TERM), saved after step 1", run.log)
    assert "attempt 1: done" in run.log


def test_a_node_that_goes_down_costs_a_restart(launch: Launch) -> None:
    run = launch({"node": "lose"}, {})
    first = run.wait_for_nodes()[0]  # where the job script runs
    run.slurm.lose_node(first)
    try:
        run.slurm.start_again(run.job)
        run.wait_for("COMPLETED")
    finally:
        run.slurm.bring_back(first)
    assert run.slurm.job(run.job)["Restarts"] == "1"
    assert "2 of 10 restarts spent" in run.log and "attempt 1: done" in run.log


def test_crashes_are_restarted_while_the_budget_lasts(launch: Launch) -> None:
    run = launch({"node": "save, crash"}, {"node": "crash"}, settings=("cluster.max_restarts=2",))
    run.slurm.start_again(run.job)
    job = run.wait_for("FAILED")
    assert job["ExitCode"] == "1:0" and len(run.attempts) == 2
    assert "attempt 0: again: crashed with status 137 at step 1, with a new checkpoint" in run.log
    assert "attempt 1: failed: crashed with status 1" in run.log  # 137, or 143 of its peer
    assert "that would spend 3 restarts of cluster.max_restarts=2" in run.log


def test_scancel_ends_the_run_which_can_then_be_launched_again(
    launch: Launch, tmp_path: Path
) -> None:
    run = launch({"node": "wait"}, {})
    run.wait_for_nodes()
    slurm, venv = run.slurm, tmp_path / "venv"
    second = launch_slurm(slurm, run.path, venv, ())
    assert second.returncode == 2
    assert f"its job {run.job} is RUNNING" in second.stderr
    slurm.call("scancel", str(run.job))
    run.wait_for("CANCELLED")
    assert len(run.attempts) == 1
    assert "it is not requeued from here" in run.log
    third = launch_slurm(slurm, run.path, venv, (f"resume={run.path}",))
    assert third.returncode == 0, third.stderr
    again = StandInRun(slurm, run.path, int((run.path / "job_id").read_text()))
    again.wait_for("COMPLETED")
    assert "attempt 1: done" in again.log


def test_nodes_that_the_preflight_finds_bad_are_left_out(launch: Launch) -> None:
    run = launch({"preflight": "bad n1"}, {}, settings=("cluster.slurm.exclude=[n4]",))
    assert run.wait_for_nodes("preflight") == ["n1", "n2"]
    run.slurm.start_again(run.job)
    assert run.wait_for_nodes("node", 1) == ["n2", "n3"]
    run.wait_for("COMPLETED")
    assert "attempt 0: again: the preflight found bad nodes; 1 of 10 restarts spent" in run.log
    assert not run.seen("node", 0)


def test_slurm_refuses_what_it_does_not_have(slurm: LocalSlurm, tmp_path: Path) -> None:
    settings = ("cluster.slurm.partition=nowhere",)
    done = launch_slurm(slurm, tmp_path / "run", tmp_path / "venv", settings)
    assert done.returncode == 2
    assert "sbatch refused" in done.stderr and "invalid partition" in done.stderr


def test_settings_that_cannot_work_are_refused_before_sbatch(
    slurm: LocalSlurm, tmp_path: Path
) -> None:
    settings = ("policy.tensor_parallel=4", "cluster.servers.count=1")
    done = launch_slurm(slurm, tmp_path / "run", tmp_path / "venv", settings)
    assert done.returncode == 2
    assert "world size 2 is not a multiple" in done.stderr
    assert "cluster.servers.program=serve goes with rollout.engine=sglang" in done.stderr
    assert not (tmp_path / "run").exists()
