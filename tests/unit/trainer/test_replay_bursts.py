"""What the self-imitation hook compares rows with (baselines), and how bursts release them."""

from pathlib import Path

import pytest
from replay_steps import LOSS, WIN, lone_group, make_hook, replayed_rows, run_step

from megatron_spear.config.method import AlgorithmSection
from megatron_spear.testing.hand_made import (
    make_group,
    make_prompt,
    make_trajectory,
    make_turn,
)
from megatron_spear.types import (
    ScoredGroup,
    ScoredTrajectory,
)


def test_the_baseline_learns_the_step_before_the_release(tmp_path: Path) -> None:
    hook = make_hook(tmp_path)
    run_step(hook, 1)
    all_won = tuple(make_group(f"2-{i}", [WIN, WIN], policy_version=1) for i in range(9))
    updates, metrics = run_step(hook, 2, all_won)
    assert metrics["replay/p50"] == pytest.approx(1.05)
    assert updates == [] and metrics["replay/kept_fraction"] == 0.0
    assert metrics["replay/stored"] == 3, "rows that are not kept stay for later"


@pytest.mark.parametrize(
    ("baseline", "advantage"),
    [
        ("p50", 0.75),  # group means 0.5, 0.25 and 0: median 0.25
        ("batch_mean", 0.875),  # this step: 0, 0 and 1 half of 1.0 in 4 trajectories: 0.125
        ("per_prompt", 0.5),  # its own group's mean: 0.5
        ("none", 0.5),  # as stored
        ("decay", 0.1),  # as stored, times 0.2
    ],
)
def test_what_a_replayed_trajectory_is_compared_with(
    tmp_path: Path, baseline: str, advantage: float
) -> None:
    """A win in a group of mean 0.5; later groups have the means 0.25 and 0."""
    hook = make_hook(tmp_path, baseline=baseline, decay=0.2 if baseline == "decay" else 1.0)
    run_step(hook, 1, lone_group(1, 1.0, 0.0))
    half = (make_group("2-y", [0.25, 0.25]), make_group("2-z", [0.0, 0.0]))
    (update,), metrics = run_step(hook, 2, half)
    (sample,) = update.samples
    assert sample.advantages.tolist() == pytest.approx([0.0, advantage, advantage])
    assert metrics["replay/advantage_mean"] == pytest.approx(advantage)
    assert metrics["replay/p50"] == 0.25
    means = {"batch_mean": 0.125, "per_prompt": 0.5}
    assert metrics.get("replay/baseline_mean") == means.get(baseline)


@pytest.mark.parametrize(("baseline", "turns_differ"), [("p50", False), ("none", True)])
def test_only_stored_advantages_keep_gigpos_turn_part(
    tmp_path: Path, baseline: str, turns_differ: bool
) -> None:
    turns = [make_turn("a"), make_turn("b")]
    members = tuple(
        ScoredTrajectory(
            trajectory=make_trajectory("g", member, (turns[: 2 - member],)),
            reward=reward,
        )
        for member, reward in enumerate((WIN, LOSS))
    )
    group = ScoredGroup(group_id="g", prompt=make_prompt("g"), members=members)
    gigpo = AlgorithmSection(advantage="gigpo")
    hook = make_hook(tmp_path, baseline=baseline)
    run_step(hook, 1, (group,), algorithm=gigpo)
    (update,), _ = run_step(hook, 2, lone_group(2, LOSS, LOSS))
    (sample,) = update.samples
    first, second = sample.advantages[[1, 4]].tolist()
    assert (first != second) is turns_differ


def test_all_failed_rollouts_leave_batch_mean_to_p50(tmp_path: Path) -> None:
    hook = make_hook(tmp_path, baseline="batch_mean")
    run_step(hook, 1)
    (update,), metrics = run_step(hook, 2, (make_group("2-x", []),))
    assert len(update.samples) == 3
    assert metrics["replay/num_compared_with_p50"] == 3
    assert metrics["replay/baseline_mean"] == metrics["replay/p50"]


def test_a_burst_waits_draws_and_clears(tmp_path: Path) -> None:
    """Capacity 5: 3 rows a step are 3, 6 and then 9 > 7.5, of which 5 are drawn and 4 forgotten."""
    hook = make_hook(tmp_path, release="burst", capacity=5, rows_per_step=1)
    seen = []
    for step in range(1, 9):
        updates, metrics = run_step(hook, step)
        rows, stored = metrics["replay/rows"], metrics["replay/stored"]
        seen.append((rows, stored, metrics.get("replay/cleared"), metrics["replay/num_releases"]))
        assert len(replayed_rows(updates)) == len(set(replayed_rows(updates))) == rows
        assert metrics["replay/evicted_by_capacity"] == 0
    assert seen[:4] == [(0, 0, None, 0), (0, 3, None, 0), (0, 6, None, 0), (5, 0, 4, 1)]
    assert seen[4:] == [(0, 3, None, 1), (0, 6, None, 1), (5, 0, 4, 2), (0, 3, None, 2)]


def test_between_bursts_only_age_bounds_the_store(tmp_path: Path) -> None:
    hook = make_hook(tmp_path, release="burst", capacity=100, max_age=2)
    for step in range(1, 8):
        _, metrics = run_step(hook, step)
    assert metrics["replay/stored"] == 6, "those of two steps"
    assert metrics["replay/evicted_by_age"] == 3
    unbounded = make_hook(tmp_path / "more", release="burst", capacity=1, max_age=9)
    for step in range(1, 4):
        _, metrics = run_step(unbounded, step, replay_weight=0.0)
    assert metrics["replay/stored"] == 6, "without gamma nothing is released or cleared"
