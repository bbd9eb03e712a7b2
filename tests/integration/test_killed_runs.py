"""Training jobs that are killed (SIGKILL) at random moments; ``tools/kill_test.py`` does more.

The killed job is the job that was left alone: every metric but the clock's, every consumed prompt,
every bit of its weights.
"""

from pathlib import Path

import pytest

from megatron_spear.testing.kills import (
    MODES,
    PROMPTS_PER_STEP,
    Killed,
    differences,
    steps_of,
    twice_or_missing,
)

pytestmark = pytest.mark.timeout(300)

SHORT = "run.steps=8"


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the warm start, which is the same for all."""
    return tmp_path_factory.mktemp("kills-cache")


@pytest.mark.parametrize(("mode", "seed"), [("synchronous", 0), ("deterministic", 1)])
def test_a_killed_job_is_the_job_left_alone(
    mode: str, seed: int, warm: Path, tmp_path: Path
) -> None:
    job = Killed((*MODES[mode], SHORT), tmp_path, cache=warm, seed=seed, most_steps=1)
    alone = job.left_alone()
    killed, report = job.killed()
    assert len(report.killed_after) >= 2 and any(report.killed_after), report
    records = steps_of(alone).values()
    assert sum(record["replay/rows"] > 0 for record in records) >= 3, "replay is on"
    assert len({record["optimizer/lr"] for record in records}) > 4, "the learning rate moves"
    assert all(record["train/num_updates"] == 2 for record in records)
    if mode == "deterministic":
        lags = [record["rollout/lag_mean"] for record in records]
        assert lags[:3] == [0.0, 1.0, 2.0] and set(lags[3:]) == {2.0}, "all of one version"
    assert differences(alone, killed) == []
    assert twice_or_missing(killed, PROMPTS_PER_STEP) == []


def test_a_killed_job_loses_and_doubles_no_prompt_on_a_continuous_schedule(
    warm: Path, tmp_path: Path
) -> None:
    job = Killed((*MODES["continuous"], SHORT), tmp_path, cache=warm, seed=2, most_steps=1)
    alone = job.left_alone()
    assert (alone / "summary.json").exists() and not (alone / "curves.png").exists()
    killed, report = job.killed()
    assert len(report.killed_after) >= 2, report
    assert twice_or_missing(killed, PROMPTS_PER_STEP) == []
