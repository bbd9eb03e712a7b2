"""What is replayed and with what advantage, from settings to metrics, in whole runs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

Records = Callable[[Path], dict[int, dict[str, Any]]]
ALWAYS = "rows stored weight p50 inserted num_releases evicted_by_age evicted_by_capacity"
RELEASED = (
    "num_candidates kept_fraction age_mean age_max advantage_mean tool_calls_mean ratio_mean "
    "clip_fraction zero_gradient_fraction cov_dropped_fraction"
)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("replay.baseline=per_prompt",), "baseline_mean num_compared_with_p50"),
        (("replay.baseline=none", "replay.require_tool_call=true"), ""),
        (("replay.release=burst", "replay.capacity=1", "replay.baseline=decay",
          "replay.decay=0.5"), "cleared"),
    ],
    ids=["per_prompt", "none", "burst"],
)  # fmt: skip
def test_a_run_that_replays_like_this(
    settings: tuple[str, ...],
    named: str,
    spear: Callable[..., Any],
    tmp_path: Path,
    training_records: Records,
) -> None:
    run_dir = tmp_path / "run"
    spear("train", f"run.dir={run_dir}", "run.steps=3", *settings)
    records = training_records(run_dir)
    for record in records.values():
        assert {name for name in ALWAYS.split() if f"replay/{name}" not in record} == set()
        assert all(math.isfinite(value) for value in record.values())
    released = [record for record in records.values() if record["replay/rows"]]
    assert released, "no release, so this proves little"
    for record in released:
        names = [*RELEASED.split(), *named.split()]
        assert {name for name in names if f"replay/{name}" not in record} == set()
        if "cleared" in names:
            assert record["replay/rows"] == 1 and record["replay/stored"] == 0
    assert records[3]["replay/num_releases"] == len(released)
