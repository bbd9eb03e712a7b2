"""The picture and the summary at the end of a run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_spear.tracking import plot
from megatron_spear.tracking.plot import moving_average, plot_curves
from megatron_spear.tracking.summary import REQUIRED, summary_rows, write_summary


def metrics_file(folder: Path, steps: int) -> Path:
    path = folder / "metrics.jsonl"
    with path.open("w") as file:
        file.write(json.dumps({"step": 0, "eval/success": 0.16}) + "\n")
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "rollout/success": 0.7 * (1 - math.exp(-step / 15)),
                "reward/mean": 0.1,
                "reward/format": 0.0,
                "policy/entropy": None if step == 2 else 0.9,
                "policy/kl": 0.001,
                "replay/rows": step,
                "curriculum/replay_weight": 1.0,
                "optimizer/lr": 1e-4,
                "time/rollout_s": 4.0,
                "time/train_s": 2.0,
                "time/step_s": 6.0,
            }
            file.write(json.dumps(record) + "\n")
        file.write(json.dumps({"step": steps, "eval/success": 0.7}) + "\n")
    return path


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    picture = plot_curves(metrics_file(tmp_path, 12), tmp_path / "curves.png", title="quickstart")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 30_000


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_hardly_began_gets_one_too(tmp_path: Path, steps: int) -> None:
    picture = plot_curves(metrics_file(tmp_path, steps), tmp_path / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_metrics_at_all(tmp_path: Path) -> None:
    picture = plot_curves(tmp_path / "nowhere.jsonl", tmp_path / "curves.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_only_panels_with_data_are_drawn(tmp_path: Path) -> None:
    records = [{"step": 1, "rollout/success": 0.5}, {"step": 2, "replay/rows": None}]
    assert len(plot._draws(records)) == 1
    assert len(plot._draws([{"step": 1, "unknown/name": 1.0}])) == 0


def test_moving_average_by_hand() -> None:
    assert moving_average(np.array([1.0, 2, 3, 4]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]
    values = np.array([0.4, np.nan, 0.2, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(moving_average(values, 3), [0.4, 0.4, 0.3, 0.2, 0.2, np.nan])


FIELDS = {
    "success_before": 0.25,
    "success_after": 0.5,
    "failed_before": 0,
    "failed_after": 2,
    "steps": 40,
    "wall_s": 75.0,
    "rollout_tokens_per_s": 12345.6,
    "train_tokens_per_s": 9.0,
    "panel_sha256": "ab" * 32,
    "success_gain_95": [0.1, 0.4],
    "success_by_task_type": {"pick": 0.5},
}


def test_summary_is_whole_and_has_the_required_keys(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", FIELDS)
    assert json.loads((tmp_path / "summary.json").read_text()) == FIELDS
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    for key in REQUIRED:
        with pytest.raises(AssertionError, match=key):
            write_summary(tmp_path / "s.json", {k: v for k, v in FIELDS.items() if k != key})


def test_summary_rows_are_for_people() -> None:
    rows = dict(summary_rows(FIELDS))
    assert rows["success before"] == "0.250"
    assert rows["wall"] == "1 min 15 s"
    assert rows["rollout tokens per second"] == "12,346"
    assert rows["panel sha256"] == "ab" * 8
    assert rows["success gain 95"] == "0.100 to 0.400"
    assert rows["success by task type: pick"] == "0.500"
    assert rows["failed after"] == "2"
    assert dict(summary_rows({"success_gain": None})) == {"success gain": "unknown"}
