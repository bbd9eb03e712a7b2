"""Runs of the real command on a model of some thousand weights: seconds once torch is loaded.

``spear`` runs the command in this process, ``launch`` starts it as its own (signals, torchrun),
``on_ranks`` on several ranks without torchrun.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from same_records import check_same_records
from tiny_runs import Outcome, arguments, run_here

from megatron_spear.testing.ranks import run_ranks


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny model and its warm start, made once, also with several pytest workers."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "spear-cache"
    with (shared / "spear-cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.glob("warm-start-*")):
            made = run_here(arguments("sft", folder, ()))
            assert made.status == 0, made.err
    return folder


@pytest.fixture(scope="session")
def command() -> Callable[..., Outcome]:
    """``command("train", "a.yaml", status=2)``: run exactly this here, check the exit status."""

    def run(*command_line: str, status: int = 0) -> Outcome:
        done = run_here(list(command_line))
        assert done.status == status, f"exit status {done.status}\n{done.out}\n{done.err}"
        return done

    return run


@pytest.fixture(scope="session")
def spear(cache: Path, command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """``spear("train", "run.steps=2", status=0)``: a tiny run with these settings on top."""

    def run(name: str, *settings: str, status: int = 0) -> Outcome:
        return command(*arguments(name, cache, settings), status=status)

    return run


class Launched:
    """A command in a process (group) of its own, its output in files."""

    def __init__(self, command_line: list[str], folder: Path, env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command_line, stdout=out, stderr=err, env=dict(env), start_new_session=True
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole group, as a terminal does it."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float) -> Outcome:
        return Outcome(self.process.wait(timeout_s), self.out, self.err)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def launch_command(tmp_path: Path) -> Iterator[Callable[[list[str]], Launched]]:
    """``launch_command(["python", ...])``: start a command, killed at the end of the test."""
    started: list[Launched] = []

    def start(line: list[str]) -> Launched:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        started.append(Launched(line, tmp_path / f"launch-{len(started)}", env))
        return started[-1]

    yield start
    for launched in started:
        launched.kill()


@pytest.fixture
def launch(cache: Path, launch_command: Callable[[list[str]], Launched]) -> Callable[..., Launched]:
    """``launch("run.dir=...", ranks=2)``: start ``train``, killed at the end of the test."""

    def start(*settings: str, ranks: int = 1, cache_dir: Path = cache) -> Launched:
        line = [sys.executable, "-m"]
        if ranks > 1:
            line += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        line += ["megatron_spear.cli.train", *arguments("train", cache_dir, settings)[1:]]
        return launch_command(line)

    return start


@pytest.fixture(scope="session")
def on_ranks(cache: Path) -> Callable[..., Outcome]:
    """``on_ranks(2, "run.dir=...")``: ``train`` on forked ranks, which have torch already; what
    rank 0 left. All have ended well."""

    def run(ranks: int, *settings: str) -> Outcome:
        ended = run_ranks(run_here, ranks, arguments("train", cache, settings), timeout_s=240)
        assert [one.status for one in ended] == [0] * ranks, ended
        return ended[0]

    return run


@pytest.fixture(scope="session")
def training_records() -> Callable[[Path], dict[int, dict[str, Any]]]:
    """Reads a run's training metrics by step, without the clock's; each step exactly once."""

    def read(run_dir: Path) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "rollout/num_trajectories" not in record:
                continue
            step = record["step"]
            assert step not in found, f"step {step} is in {run_dir} twice"
            found[step] = {k: v for k, v in record.items() if not k.startswith("time")}
        return found

    return read


@pytest.fixture(scope="session")
def same_weights() -> Callable[[Path, Path, float], None]:
    """``same_weights(run_dir, run_dir, atol)``: both runs exported the same model."""

    def check(one: Path, other: Path, atol: float) -> None:
        import torch
        from safetensors.torch import load_file

        expected, found = (load_file(run / "model" / "model.safetensors") for run in (one, other))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=atol)

    return check


@pytest.fixture(scope="session")
def same_run(
    training_records: Callable[[Path], dict[int, dict[str, Any]]],
    same_weights: Callable[[Path, Path, float], None],
) -> Callable[[Path, Path], None]:
    """Equal training metrics and trajectories of every step (but times), equal exported weights."""

    def check(one: Path, other: Path) -> None:
        expected, found = training_records(one), training_records(other)
        assert list(found) == list(expected)
        for step, record in expected.items():
            assert found[step].keys() == record.keys()
            for name, value in record.items():
                # Which contexts share the engine's batch is a matter of timing; it rounds
                # accordingly.
                rounding = 1e-5 if name.startswith("mismatch/") else 1e-9
                told = f"{name} at step {step}"
                assert found[step][name] == pytest.approx(value, rel=1e-6, abs=rounding), told
        check_same_records(one, other)
        same_weights(one, other, 1e-7)

    return check


@pytest.fixture
def stopped_and_resumed(
    spear: Callable[..., Outcome], tmp_path: Path, same_weights: Callable[[Path, Path, float], None]
) -> Callable[..., tuple[Path, Path]]:
    """``stopped_and_resumed("run.steps=3", after=1)``: the directories of a run that goes through
    and of one that is stopped after this many steps and resumed; both have exported one model."""

    def run(*settings: str, after: int) -> tuple[Path, Path]:
        whole, parted = tmp_path / "whole", tmp_path / "parted"
        spear("train", f"run.dir={whole}", *settings)
        spear("train", f"run.dir={parted}", *settings, f"run.stop_after={after}")
        spear("train", f"resume={parted}", *settings)
        same_weights(whole, parted, 1e-7)
        return whole, parted

    return run
