"""The wall clock jumps by hours, forwards and backwards, in a run and between its launches."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)

SETTINGS = (
    "run.steps=3",
    "run.hang_limit_s=60",
    "rollout.engine_deadline_s=30",
    "rollout.env_deadline_s=30",
    "algorithm.keep_groups_fraction=1.0",
    "checkpoint.every=1",
)
HOUR_S = 3600.0


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Every look at the wall clock finds it elsewhere; the times that were told."""
    told: list[float] = []
    real, jumps = time.time, itertools.cycle([0.0, 5.0, -7.0, 100.0, -100.0])

    def now() -> float:
        told.append(real() + HOUR_S * next(jumps))
        return told[-1]

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now() * 1e9))
    yield told


def test_no_deadline_fires_and_the_run_is_the_same(
    spear: Callable[..., Any],
    tmp_path: Path,
    jumping: list[float],
    monkeypatch: pytest.MonkeyPatch,
    same_run: Callable[[Path, Path], None],
) -> None:
    jumped, plain = tmp_path / "jumped", tmp_path / "plain"
    spear("train", f"run.dir={jumped}", *SETTINGS, "run.stop_after=2")
    spear("train", f"resume={jumped}", *SETTINGS)
    assert max(jumping) - min(jumping) > 100 * HOUR_S, "the run has seen the jumps"
    monkeypatch.undo()
    spear("train", f"run.dir={plain}", *SETTINGS)
    same_run(plain, jumped)
    records = [json.loads(line) for line in (jumped / "metrics.jsonl").read_text().splitlines()]
    times = [pair for record in records for pair in record.items() if pair[0].startswith("time/")]
    assert times and all(0.0 <= seconds < 300.0 for _, seconds in times), times
    summary = json.loads((jumped / "summary.json").read_text())
    assert 0.0 < summary["wall_s"] < 300.0
