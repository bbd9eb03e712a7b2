"""Rollouts ahead of training: tokens of several versions, and each prompt exactly once over a
stop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.tracking.recorded_files import FOLDER, read_step

pytestmark = pytest.mark.timeout(300)

SETTINGS = (
    "run.steps=4",
    "rollout.max_lag=1",
    "policy.optimizer.lr=0.002",
    "algorithm.off_policy_correction.mode=token-truncate",
    "algorithm.keep_groups_fraction=1.0",
    "checkpoint.every=1",
    "checkpoint.keep=4",
)
Records = Callable[[Path], dict[int, dict[str, Any]]]


@pytest.mark.parametrize("mode", ["retract", "abort"])
def test_a_run_with_lag_trains_on_tokens_of_both_versions(
    mode: str, spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS, f"rollout.pause_mode={mode}")
    records = training_records(run_dir)
    assert sorted(records) == [1, 2, 3, 4]
    assert records[1]["rollout/lag_0_fraction"] == 1.0, "nothing older is there yet"
    later = [records[step] for step in (2, 3, 4)]
    assert all(record["rollout/failed"] == 0 for record in later)
    assert any(record["rollout/lag_1_fraction"] > 0 for record in later), "nothing ran ahead"
    for record in later:
        fractions = record["rollout/lag_0_fraction"] + record["rollout/lag_1_fraction"]
        assert fractions == pytest.approx(1.0)
        assert "mismatch/logprob_gap_mean" in record, "the gap is always logged"
    step = read_step(run_dir / FOLDER, 4)
    versions = {
        span.policy_version
        for trajectory in step.trajectories
        for turn in trajectory.turns
        for span in turn.versions
    }
    assert versions <= {2, 3} and step.policy_version == 3


def test_a_stop_loses_no_prompt_and_repeats_none(
    spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", *SETTINGS, "run.stop_after=2")
    state = json.loads((run_dir / "checkpoints" / "step_2" / "trainer.json").read_text())
    assert state["cursor"] == {"consumed": 6, "begun": {"3": [4, 5]}}
    spear("train", f"resume={run_dir}", *SETTINGS)
    assert sorted(training_records(run_dir)) == [1, 2, 3, 4]
    state = json.loads((run_dir / "checkpoints" / "step_4" / "trainer.json").read_text())
    assert state["cursor"] == {"consumed": 8}
