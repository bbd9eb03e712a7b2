"""The curriculum in whole runs: tasks drawn by difficulty, schedules, intrinsic rewards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

Records = Callable[[Path], dict[int, dict[str, Any]]]
TASKS = (
    "run.steps=3",
    "checkpoint.every=1",
    "curriculum.tasks={enabled: true, decay: 0.5, min_share: 0.1}",
    "rollout.prompts_per_step=1",  # so that one kind of task is known before the other
    "algorithm.keep_groups_fraction=1",
    "policy.optimizer.lr=0.002",
)
KINDS = ("pick_and_place_simple", "look_at_obj_in_light")


def test_a_resumed_run_draws_the_same_tasks(
    stopped_and_resumed: Callable[..., tuple[Path, Path]], training_records: Records
) -> None:
    whole, parted = stopped_and_resumed(*TASKS, after=1)
    expected, found = training_records(whole), training_records(parted)
    assert list(found) == list(expected) == [1, 2, 3]
    for step, record in expected.items():
        assert found[step] == pytest.approx(record, rel=1e-6, abs=1e-5), f"step {step}"
    shares = [
        [record[f"curriculum/share_{kind}"] for kind in KINDS] for record in expected.values()
    ]
    assert shares[0] == [0.5, 0.5] and shares[1] != [0.5, 0.5], "the first step was measured"
    assert all(sum(step) == pytest.approx(1.0) and min(step) >= 0.1 for step in shares)


def test_a_run_with_an_official_intrinsic_reward_and_other_schedules(
    spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    run_dir = tmp_path / "run"
    settings = (
        "run.steps=2",
        "reward.intrinsic.type=official_linear",
        "curriculum.intrinsic_schedule=linear",
        "curriculum.intrinsic_decay_steps=4",
        "curriculum.replay_schedule=constant",
    )
    spear("train", f"run.dir={run_dir}", *settings)
    records = training_records(run_dir)
    assert [r["curriculum/intrinsic_weight"] for r in records.values()] == [0.75, 0.5]
    assert [r["curriculum/replay_weight"] for r in records.values()] == [1.0, 1.0]
    for record in records.values():
        # At most 8 turns, each with one call, valid or not: the mean bonus is that of the turns.
        assert record["reward/intrinsic"] == pytest.approx(0.1 * record["rollout/turns_mean"])
        shaped = record["reward/outcome"] + record["reward/format"]
        shaped += record["curriculum/intrinsic_weight"] * record["reward/intrinsic"]
        assert record["reward/mean"] == pytest.approx(shaped)
