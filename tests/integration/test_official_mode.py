"""The official mode as whole runs: it replays in bursts, and a stopped run goes on the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from same_records import check_same_records

from megatron_spear.tracking.recorded_files import FOLDER, read_step

pytestmark = pytest.mark.timeout(300)

Records = Callable[[Path], dict[int, dict[str, Any]]]
SETTINGS = (
    "run.steps=4",
    "checkpoint.every=1",
    "evaluation.every=2",
    "algorithm.compat=official",
    "algorithm.loss={type: clip_cov, fraction: 0.01, low: 0.001, high: 5}",
    "replay.combine=separate_step",
    "replay.ratio_filter=null",
    "replay.loss={type: clip_cov, fraction: 0.02, low: 0.001, high: 60}",
    "replay.capacity=4",
    "replay.rows_per_step=1",
    "reward.invalid_action_penalty=0.1",  # so that rows differ
    "policy.optimizer.lr=0.002",
)
TREES = {
    "agent": ("env.history={window: 2}",),
    "math": (
        "algorithm.official.tree=math",
        "replay.capacity=1",
        "replay.loss={type: clip_cov, fraction: 0.01, low: 0.001, high: 5}",
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_defect_06_a_run_that_replays_evaluates_and_resumes_as_if_not_stopped(
    tree: str,
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
    same_weights: Callable[[Path, Path, float], None],
) -> None:
    settings = (*SETTINGS, *TREES[tree])
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    spear("train", f"run.dir={whole}", *settings)
    spear("train", f"run.dir={parted}", *settings, "run.stop_after=2")
    spear("train", f"resume={parted}", *settings)
    expected, found = training_records(whole), training_records(parted)
    assert list(found) == list(expected) == [1, 2, 3, 4]
    for step, record in expected.items():
        assert found[step] == pytest.approx(record, rel=1e-6, abs=1e-5), f"step {step}"
    same_weights(whole, parted, 1e-7)
    check_same_records(whole, parted)
    released = [step for step, record in expected.items() if record["replay/rows"]]
    assert released and max(released) > 2, "a release after the stop, else this proves little"
    replayed = {step: read_step(whole / FOLDER, step).replayed for step in expected}
    assert {step: len(rows) for step, rows in replayed.items() if rows} == {
        step: expected[step]["replay/rows"] for step in released
    }
    step = expected[released[-1]]
    assert step["train/num_updates"] == 2 and step["replay/stored"] == 0
    assert "replay/p50" in step and "replay/cov_dropped_fraction" in step
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/success" in line] == [0, 2, 4]
