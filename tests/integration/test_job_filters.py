"""Row filters and dynamic sampling in whole runs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

Records = Callable[[Path], dict[int, dict[str, Any]]]


def test_dynamic_sampling_fills_up_and_resumes(
    stopped_and_resumed: Callable[..., tuple[Path, Path]], training_records: Records
) -> None:
    settings = ("run.steps=3", "algorithm.dynamic_sampling_rounds=2")
    whole, _ = stopped_and_resumed(*settings, after=2)
    resampled = 0.0
    for record in training_records(whole).values():
        assert record["filter/num_sampling_rounds"] <= 2
        assert record["filter/num_groups"] == 2, "as many go on as without further rounds"
        replaced = record["filter/num_resampled_groups"]
        assert record["rollout/num_trajectories"] == 4 * (2 + replaced)
        resampled += replaced
    assert resampled > 0


def test_filters_of_rows_that_are_turns(
    spear: Callable[..., Any], tmp_path: Path, training_records: Records
) -> None:
    """A tiny model keeps to the paper's prompt now and then only: many answers are void or cut."""
    run_dir = tmp_path / "run"
    spear(
        "train",
        f"run.dir={run_dir}",
        "run.steps=3",
        "env.history={window: 2}",
        "env.prompt=official",
        "rollout.max_context=2048",
        "rollout.max_new_tokens=32",
        "env.max_turns=4",
        "sft.steps=100",
        "sft.trajectories_per_step=4",
    )
    records = training_records(run_dir)
    assert len(records) == 3
    for record in records.values():
        assert all(math.isfinite(value) for value in record.values())
        rows = record["rollout/num_trajectories"] * record["rollout/turns_mean"]
        marked = round(record["filter/marked_fraction"] * rows)
        overlong, void = record["filter/overlong_rows"], record["filter/void_rows"]
        assert 0 < max(overlong, void) <= marked <= min(overlong + void, rows)
    assert sum(record["train/num_rows"] for record in records.values()) > 0
