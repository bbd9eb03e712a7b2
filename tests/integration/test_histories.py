"""Histories and prompts other than the quick start's, each from warm start to update."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_spear.tracking.recorded_files import FOLDER, read_step

pytestmark = pytest.mark.timeout(300)

Records = Callable[[Path], dict[int, dict[str, Any]]]
OFFICIAL = (
    "env.prompt=official",
    "rollout.max_context=2048",
    "rollout.max_new_tokens=24",
    "env.max_turns=4",
    "env.generator={min_receptacles: 8, max_receptacles: 8, min_objects: 4, max_objects: 6}",
    "sft.steps=30",
    "sft.trajectories_per_step=4",
)


def test_window_history_makes_a_segment_a_turn(
    spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", "run.steps=2", "env.history={window: 2}")
    for record in training_records(run_dir).values():
        turns = record["rollout/turns_mean"]
        assert turns > 1 and record["rollout/failed"] == 0
        # Groups of 4, 2 kept at most: more rows than trajectories means several rows a trajectory.
        assert record["train/num_rows"] > record["rollout/num_trajectories"]
        assert record["mismatch/max_logprob_gap"] < 1e-3
    for trajectory in read_step(run_dir / FOLDER, 2).trajectories:
        assert [turn.segment for turn in trajectory.turns] == list(range(len(trajectory.turns)))
        assert len(trajectory.segment_marks) == len(trajectory.turns)
    # A window's context does not grow with the game.
    assert record["rollout/max_context"] < 200


def test_rendered_history_is_one_segment_where_the_template_keeps_what_was_said(
    spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", "run.steps=2", "env.history=rendered")
    for record in training_records(run_dir).values():
        assert record["rollout/turns_mean"] > 1 and record["rollout/failed"] == 0
        assert record["rollout/token_drift"] == 0
        assert record["rollout/branches"] < record["rollout/turns_mean"] - 1, "most turns extend"
        assert record["mismatch/max_logprob_gap"] < 1e-3


@pytest.mark.parametrize("history", ["full", "{window: 2}"])
def test_official_prompt(
    history: str, spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", "run.steps=1", f"env.history={history}", *OFFICIAL)
    (record,) = training_records(run_dir).values()
    assert record["rollout/failed"] == 0
    assert record["rollout/context_full_fraction"] == 0
    assert record["rollout/max_context"] > 100
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 1
