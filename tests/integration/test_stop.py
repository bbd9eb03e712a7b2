"""Ctrl-C: once is a clean stop to resume from, twice ends at once; nothing stays half-written."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Outcome, arguments, run_here

from megatron_spear.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)

SETTINGS = ("run.steps=8", "policy.optimizer.lr=0.002", "checkpoint.every=0")
Records = Callable[[Path], dict[int, dict[str, Any]]]


def until(condition: Callable[[], bool], launched: Any, limit_s: float = 180.0) -> None:
    """Wait for the condition; fails when the process ends or the time is over before."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert launched.process.poll() is None, launched.out + launched.err
        assert time.monotonic() < deadline, launched.out + launched.err
        time.sleep(0.02)


def has_step(run_dir: Path, step: int) -> bool:
    file = run_dir / "metrics.jsonl"
    return file.is_file() and f'"step": {step},' in file.read_text()


def test_one_ctrl_c_stops_cleanly_and_resumes(
    launch: Callable[..., Any],
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_weights: Callable[[Path, Path, float], None],
) -> None:
    run_dir = tmp_path / "run"
    launched = launch(f"run.dir={run_dir}", *SETTINGS)
    until(lambda: has_step(run_dir, 1), launched)
    launched.interrupt()
    done = launched.wait(60)
    assert done.status == 130, done.out + done.err
    assert "SIGINT: stopping cleanly after this step; Ctrl-C again stops at once" in done.err
    saved = len(training_records(run_dir))
    assert 1 <= saved < 8
    assert f"stopped: SIGINT; saved at step {saved}, continue with resume={run_dir}" in done.err
    assert "Traceback" not in done.err
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step_{saved}"]

    resumed = spear("train", f"resume={run_dir}", *SETTINGS)
    assert f"continuing after step {saved} of 8" in resumed.out
    whole = tmp_path / "whole"
    spear("train", f"run.dir={whole}", *SETTINGS)
    expected, found = training_records(whole), training_records(run_dir)
    assert list(found) == list(expected)
    for step, record in expected.items():
        assert found[step] == pytest.approx(record, rel=1e-6, abs=1e-5), f"step {step}"
    same_weights(whole, run_dir, 1e-7)


@pytest.mark.parametrize("wait_s", [0.1, 2.0])
def test_ctrl_c_in_the_warm_start(
    wait_s: float, launch: Callable[..., Any], tmp_path: Path
) -> None:
    """While the worker process is still starting (it gets the signal too), and in the middle."""
    folder = tmp_path / "cache"
    launched = launch(f"run.dir={tmp_path / 'run'}", "sft.steps=100000", cache_dir=folder)
    until(lambda: has_worker(launched.process.pid), launched)
    time.sleep(wait_s)
    launched.interrupt()
    done = launched.wait(60)
    assert done.status == 130, done.out + done.err
    assert "stopped: SIGINT in the warm start" in done.err
    assert "Traceback" not in done.err
    assert [p.name.split("-")[0] for p in folder.iterdir()] == ["tiny"]


def has_worker(parent: int) -> bool:
    """Whether the process has a child that multiprocessing spawned."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{parent}\n" in status.read_text():
                command = status.with_name("cmdline").read_bytes()
                if b"spawn_main" in command:
                    return True
    return False


def test_a_second_ctrl_c_ends_at_once(launch: Callable[..., Any], tmp_path: Path) -> None:
    """In a step that would take minutes; nothing half-written stays."""
    run_dir = tmp_path / "run"
    launched = launch(f"run.dir={run_dir}", "rollout.prompts_per_step=500", "run.steps=1")
    until(lambda: "SPEAR steps" in launched.out, launched)
    launched.interrupt()
    until(lambda: "stopping cleanly" in launched.err, launched)
    time.sleep(1.0)
    assert launched.process.poll() is None
    launched.interrupt()
    done = launched.wait(15)
    assert done.status == 130, done.out + done.err
    assert "stopped at once" in done.err
    assert "Traceback" not in done.err
    assert not any((run_dir / "checkpoints").iterdir())


def test_ctrl_c_in_an_evaluation_loses_no_step(
    launch: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    """Between checkpoints, in the middle of a long evaluation: the finished steps are saved."""
    run_dir = tmp_path / "run"
    launched = launch(f"run.dir={run_dir}", *SETTINGS, "evaluation.every=1", "evaluation.games=150")
    until(lambda: "Evaluation at step 1" in launched.out, launched)
    launched.interrupt()
    done = launched.wait(60)
    assert done.status == 130, done.out + done.err
    assert f"SIGINT during an evaluation; continue with resume={run_dir}" in done.err
    assert "Traceback" not in done.err
    assert list(training_records(run_dir)) == [1]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_1"]


def _with_a_signal_to_rank_1(command_line: list[str], run_dir: Path) -> Outcome:
    def signal_once_it_trains() -> None:
        while not has_step(run_dir, 1):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    if os.environ["RANK"] == "1":
        threading.Thread(target=signal_once_it_trains, daemon=True).start()
    return run_here(command_line)


def test_a_signal_to_one_rank_stops_all_of_them_after_the_same_step(
    cache: Path, tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    line = arguments("train", cache, (f"run.dir={run_dir}", *SETTINGS))
    ended = run_ranks(_with_a_signal_to_rank_1, 2, line, run_dir, timeout_s=240)
    saved = len(training_records(run_dir))
    assert 1 <= saved < 8
    for one, reason in zip(ended, ("a signal to another rank", "SIGUSR1"), strict=True):
        assert one.status == 130, one
        assert f"stopped: {reason}; saved at step {saved}, continue" in one.err
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step_{saved}"]
