"""A run that was stopped and resumed is the run that was not stopped."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

SETTINGS = (
    "run.steps=4",
    "policy.optimizer.lr=0.002",
    "policy.optimizer.warmup_steps=4",
    "algorithm.keep_groups_fraction=1.0",
    "replay.rows_per_step=2",  # fewer than there are, so that some lie in the store over a stop
    "checkpoint.every=1",
    "checkpoint.keep=4",
)
Records = Callable[[Path], dict[int, dict[str, Any]]]
Same = Callable[..., None]
FallsBack = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def whole(spear: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one go."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS)
    return run_dir


@pytest.fixture(scope="module")
def stopped(spear: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after step 3."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    done = spear("train", f"run.dir={run_dir}", *SETTINGS, "run.stop_after=3")
    assert f"resume={run_dir}" in done.out
    assert not (run_dir / "summary.json").exists()
    return run_dir


def test_the_run_exercises_what_has_to_survive(whole: Path, training_records: Records) -> None:
    """Replay in steps 3 and 4 and a moving learning rate; else the tests below prove little."""
    records = training_records(whole)
    assert records[3]["replay/rows"] > 0 and records[4]["replay/rows"] > 0
    assert len({record["optimizer/lr"] for record in records.values()}) == 4
    assert len({record["replay/p50"] for record in records.values()}) > 1


def test_resumed_is_not_stopped(
    whole: Path,
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_run: Same,
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS, "run.stop_after=2")
    assert list(training_records(run_dir)) == [1, 2]
    done = spear("train", f"resume={run_dir}", *SETTINGS)
    assert "continuing after step 2 of 4" in done.out
    same_run(whole, run_dir)


def test_a_run_that_has_ended_goes_on_with_more_steps(
    whole: Path, spear: Callable[..., Any], tmp_path: Path, same_run: Same
) -> None:
    run_dir = tmp_path / "run"
    shorter = (*SETTINGS, "run.steps=2")
    spear("train", f"run.dir={run_dir}", *shorter)
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2
    fewer = spear("train", f"resume={run_dir}", *SETTINGS, "run.steps=1", status=2)
    assert "run.steps: was 2, now 1" in fewer.err
    cut_off = spear("train", f"resume={run_dir}", *SETTINGS, "run.stop_after=3")
    assert "continuing after step 2 of 4" in cut_off.out
    assert not (run_dir / "summary.json").exists(), "that of the shorter run"
    spear("train", f"resume={run_dir}", *SETTINGS)
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 4
    assert (run_dir / "model.before-1").is_dir()
    same_run(whole, run_dir)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    """One bit in the middle."""
    with file.open("rb+") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture
def falls_back(whole: Path, spear: Callable[..., Any], same_run: Same) -> FallsBack:
    """A check: with ``file`` damaged, resuming a run stopped at step 3 goes on from step 2, says
    so, and ends as the whole run."""

    def check(run_dir: Path, file: Path) -> None:
        done = spear("train", f"resume={run_dir}", *SETTINGS)
        told = done.out + done.err
        assert "passing over checkpoint" in told and "step_3" in told and file.name in told
        assert "continuing after step 2 of 4" in told
        assert (run_dir / "checkpoints" / "step_3.damaged").is_dir()
        same_run(whole, run_dir)

    return check


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_a_damaged_checkpoint_costs_one_step(
    damage: Callable[[Path], None], stopped: Path, tmp_path: Path, falls_back: FallsBack
) -> None:
    """Falls back to step 2, says so, does step 3 again; a half-written step 4 is swept away."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    file = max(
        (run_dir / "checkpoints" / "step_3").rglob("*.distcp"), key=lambda f: f.stat().st_size
    )
    damage(file)
    (run_dir / "checkpoints" / "step_4.tmp" / "policy").mkdir(parents=True)
    falls_back(run_dir, file)
    assert not (run_dir / "checkpoints" / "step_4.tmp").exists()


def test_damaged_replay_rows_cost_one_step(
    stopped: Path, tmp_path: Path, falls_back: FallsBack
) -> None:
    """The rows of step 3 lie outside its checkpoint: falls back to step 2, says so."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    file = max((run_dir / "replay").iterdir())
    needed = [_replay_files(run_dir, step) for step in (2, 3)]
    assert file.name not in needed[0] and file.name in needed[1]
    _cut(file)
    falls_back(run_dir, file)


def _replay_files(run_dir: Path, step: int) -> list[str]:
    """The replay files that a checkpoint needs."""
    state = json.loads((run_dir / "checkpoints" / f"step_{step}" / "trainer.json").read_text())
    store = state["hooks"]["built_in.self_imitation"]["store"]
    return [f"segment-{file['number']:08d}.bin" for file in store["files"]]


def test_a_finished_run_can_be_resumed_to_no_effect(
    whole: Path,
    spear: Callable[..., Any],
    tmp_path: Path,
    same_run: Same,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    spear("train", f"resume={run_dir}", *SETTINGS)
    same_run(whole, run_dir)


def test_resume_without_a_file_takes_the_runs_own_settings(
    whole: Path,
    stopped: Path,
    command: Callable[..., Any],
    tmp_path: Path,
    same_run: Same,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    done = command("train", f"resume={run_dir}")
    assert "continuing after step 3 of 4" in done.out
    same_run(whole, run_dir)
