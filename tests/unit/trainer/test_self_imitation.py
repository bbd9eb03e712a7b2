"""The self-imitation hook over whole steps: order, admission, ages, exact resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.errors import CheckpointError, DataError
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import (
    make_group,
    make_prompt,
    make_sample,
    make_trajectory,
    make_turn,
)
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.types import (
    Coefficients,
    Origin,
    Reward,
    ScoredGroup,
    ScoredTrajectory,
    Segment,
    StepContext,
    StepReport,
    Trajectory,
    Update,
)

WIN = Reward(outcome=1.0, intrinsic=0.1)
LOSS = Reward(outcome=0.0, intrinsic=0.1)


def _ctx(step: int, replay_weight: float = 0.5) -> StepContext:
    return StepContext(
        step=step,
        policy_version=step - 1,
        coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=replay_weight),
        seed=7,
    )


def _groups(step: int, count: int = 3, **changes: Any) -> tuple[ScoredGroup, ...]:
    """Groups of one win and three losses, made with the step's weights."""
    return tuple(
        make_group(f"{step}-{i}", [LOSS, WIN, LOSS, LOSS], policy_version=step - 1, **changes)
        for i in range(count)
    )


def _run_step(
    hook: Hook,
    step: int,
    groups: tuple[ScoredGroup, ...] | None = None,
    replay_weight: float = 0.5,
    algorithm: AlgorithmSection | None = None,
) -> tuple[list[Update], dict[str, float]]:
    ctx = _ctx(step, replay_weight)
    groups = hook.on_scored(ctx, _groups(step) if groups is None else groups)
    weight = ctx.coefficients.intrinsic_weight
    samples = make_samples(groups, turn_advantages(groups, algorithm or AlgorithmSection(), weight))
    final = [replace(s, old_logprobs=s.old_logprobs - np.float32(step)) for s in samples]
    hook.on_samples(ctx, final)
    updates = hook.extra_updates(ctx)
    metrics = hook.metrics()
    report = StepReport(step=step, policy_version=step, metrics=metrics)
    hook.on_step_end(ctx, report)
    return updates, metrics


def _replayed(updates: list[Update]) -> list[str]:
    return [str(sample.trajectory_id) for update in updates for sample in update.samples]


def _stored(hook: SelfImitationHook, folder: Path) -> list[str]:
    """The rows a resumed run would find."""
    store = ReplayStore(folder, None)
    store.load_state_dict(hook.state_dict()["store"])
    return [str(rows[0].trajectory_id) for rows in store.take(store.index().row_ids)]


def _hook(folder: Path, **changes: Any) -> SelfImitationHook:
    values = {"capacity": 50, "max_age": 5, "rows_per_step": 8, "baseline_history": 20}
    return SelfImitationHook(ReplaySection(**(values | changes)), folder)


def test_a_step_replays_earlier_rows_only(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    updates, metrics = _run_step(hook, 1)
    assert updates == []
    assert metrics["replay/inserted"] == 3 and metrics["replay/stored"] == 0
    (update,), metrics = _run_step(hook, 2)
    assert _replayed([update]) == ["1-0/1", "1-1/1", "1-2/1"]
    assert (update.origin, update.weight) == (Origin.REPLAY, 0.5)
    assert metrics["replay/rows"] == 3 and metrics["replay/weight"] == 0.5
    assert metrics["replay/kept_fraction"] == 1.0 and metrics["replay/age_mean"] == 1.0
    assert _replayed(_run_step(hook, 3)[0]) == ["2-0/1", "2-1/1", "2-2/1"]


def test_advantages_are_recalibrated_and_old_logprobs_are_those_of_collection(
    tmp_path: Path,
) -> None:
    hook = _hook(tmp_path)
    _run_step(hook, 1)
    (update,), metrics = _run_step(hook, 2)
    p50 = 0.25 + 0.5 * 0.1
    assert metrics["replay/p50"] == pytest.approx(p50)
    for sample in update.samples:
        assert sample.advantages.tolist() == pytest.approx([0, 1.05 - p50, 1.05 - p50])
        assert sample.old_logprobs[1:].tolist() == [-1.5, -1.5]
        assert sample.policy_version == 0


def test_the_baseline_learns_the_step_before_the_release(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    _run_step(hook, 1)
    all_won = tuple(make_group(f"2-{i}", [WIN, WIN], policy_version=1) for i in range(9))
    updates, metrics = _run_step(hook, 2, all_won)
    assert metrics["replay/p50"] == pytest.approx(1.05)
    assert updates == [] and metrics["replay/kept_fraction"] == 0.0
    assert metrics["replay/stored"] == 3, "rows that are not kept stay for later"


def test_only_rows_better_than_their_group_enter(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    groups = (make_group("a", [LOSS, LOSS]), make_group("b", [WIN]), make_group("c", [WIN, LOSS]))
    _run_step(hook, 1, groups)
    assert _stored(hook, tmp_path) == ["c/0"]


@pytest.mark.parametrize(("required", "stored"), [(True, 0), (False, 3)])
def test_valid_action_is_required(tmp_path: Path, required: bool, stored: int) -> None:
    hook = _hook(tmp_path, require_valid_action=required)
    _run_step(hook, 1, _groups(1, valid=False))
    assert len(_stored(hook, tmp_path)) == stored


@pytest.mark.parametrize(("required", "stored"), [(True, ["a/1"]), (False, ["a/0", "a/1"])])
def test_a_tool_call_in_any_segment_is_required(
    tmp_path: Path, required: bool, stored: list[str]
) -> None:
    hook = _hook(tmp_path, require_tool_call=required)
    hook.on_scored(_ctx(1), (make_group("a", [WIN, WIN, LOSS, LOSS]),))
    calls = {(0, 0): 0, (0, 1): 0, (1, 0): 0, (1, 1): 2}
    samples = [
        make_sample("a", member, segment=segment, num_segments=2, tool_calls=count)
        for (member, segment), count in calls.items()
    ]
    hook.on_samples(_ctx(1), samples)
    assert hook.metrics()["replay/inserted"] == len(stored)
    hook.on_step_end(_ctx(1), StepReport(step=1, policy_version=1, metrics={}))
    assert _stored(hook, tmp_path) == stored


def _lone(step: int, *rewards: Reward | float) -> tuple[ScoredGroup, ...]:
    """One group of that step with these rewards."""
    return (make_group(f"{step}-x", rewards, policy_version=step - 1),)


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
    hook = _hook(tmp_path, baseline=baseline, decay=0.2 if baseline == "decay" else 1.0)
    _run_step(hook, 1, _lone(1, 1.0, 0.0))
    half = (make_group("2-y", [0.25, 0.25]), make_group("2-z", [0.0, 0.0]))
    (update,), metrics = _run_step(hook, 2, half)
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
    hook = _hook(tmp_path, baseline=baseline)
    _run_step(hook, 1, (group,), algorithm=gigpo)
    (update,), _ = _run_step(hook, 2, _lone(2, LOSS, LOSS))
    (sample,) = update.samples
    first, second = sample.advantages[[1, 4]].tolist()
    assert (first != second) is turns_differ


def test_all_failed_rollouts_leave_batch_mean_to_p50(tmp_path: Path) -> None:
    hook = _hook(tmp_path, baseline="batch_mean")
    _run_step(hook, 1)
    (update,), metrics = _run_step(hook, 2, (make_group("2-x", []),))
    assert len(update.samples) == 3
    assert metrics["replay/num_compared_with_p50"] == 3
    assert metrics["replay/baseline_mean"] == metrics["replay/p50"]


def test_a_burst_waits_draws_and_clears(tmp_path: Path) -> None:
    """Capacity 5: 3 rows a step are 3, 6 and then 9 > 7.5, of which 5 are drawn and 4 forgotten."""
    hook = _hook(tmp_path, release="burst", capacity=5, rows_per_step=1)
    seen = []
    for step in range(1, 9):
        updates, metrics = _run_step(hook, step)
        rows, stored = metrics["replay/rows"], metrics["replay/stored"]
        seen.append((rows, stored, metrics.get("replay/cleared"), metrics["replay/num_releases"]))
        assert len(_replayed(updates)) == len(set(_replayed(updates))) == rows
        assert metrics["replay/evicted_by_capacity"] == 0
    assert seen[:4] == [(0, 0, None, 0), (0, 3, None, 0), (0, 6, None, 0), (5, 0, 4, 1)]
    assert seen[4:] == [(0, 3, None, 1), (0, 6, None, 1), (5, 0, 4, 2), (0, 3, None, 2)]


def test_between_bursts_only_age_bounds_the_store(tmp_path: Path) -> None:
    hook = _hook(tmp_path, release="burst", capacity=100, max_age=2)
    for step in range(1, 8):
        _, metrics = _run_step(hook, step)
    assert metrics["replay/stored"] == 6, "those of two steps"
    assert metrics["replay/evicted_by_age"] == 3
    unbounded = _hook(tmp_path / "more", release="burst", capacity=1, max_age=9)
    for step in range(1, 4):
        _, metrics = _run_step(unbounded, step, replay_weight=0.0)
    assert metrics["replay/stored"] == 6, "without gamma nothing is released or cleared"


def test_metrics_of_a_step_with_replay(tmp_path: Path) -> None:
    """The names of the method's list; gamma, mu and what the loss gives are added elsewhere."""
    hook = _hook(tmp_path, rows_per_step=2, capacity=4, max_age=2)
    called = tuple(
        replace(
            group,
            members=tuple(
                replace(m, trajectory=_with_tool_calls(m.trajectory, 4)) for m in group.members
            ),
        )
        for group in _groups(1)
    )
    _run_step(hook, 1, called)
    (update,), first = _run_step(hook, 2)
    assert len(update.samples) == 2
    assert first | {"replay/p50": 0, "replay/advantage_mean": 0} == {
        "replay/weight": 0.5,
        "replay/p50": 0,
        "replay/inserted": 3,
        "replay/num_candidates": 3,
        "replay/kept_fraction": 1.0,
        "replay/rows": 2,
        "replay/num_releases": 1,
        "replay/age_mean": 1.0,
        "replay/age_max": 1.0,
        "replay/advantage_mean": 0,
        "replay/tool_calls_mean": 4.0,
        "replay/stored": 1,
        "replay/evicted_by_age": 0,
        "replay/evicted_by_capacity": 0,
    }
    _, third = _run_step(hook, 3, replay_weight=0.0)  # 1 + 3 are stored: 3 more do not fit
    assert third["replay/evicted_by_capacity"] == 0 and third["replay/num_releases"] == 1
    nothing = (make_group("x", [LOSS, LOSS]),)
    _, fourth = _run_step(hook, 4, nothing, replay_weight=0.0)
    assert fourth["replay/evicted_by_capacity"] == 3
    assert fourth["replay/evicted_by_age"] == 0
    _, fifth = _run_step(hook, 5, nothing, replay_weight=0.0)
    assert (fifth["replay/evicted_by_capacity"], fifth["replay/evicted_by_age"]) == (0, 1)


def _with_tool_calls(trajectory: Trajectory, count: int) -> Trajectory:
    """The one-turn trajectory with its call that many times."""
    (turn,) = trajectory.turns
    turn = replace(turn, tool_calls=turn.tool_calls * count)
    return replace(trajectory, segments=(Segment(turns=(turn,)),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(DataError, match="expected finite numbers"):
        _run_step(_hook(tmp_path), 1, _lone(1, 1.0, value))


def test_large_rewards_are_replayed(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    _run_step(hook, 1, _lone(1, 1e6, -1e6))
    (update,), _ = _run_step(hook, 2, _lone(2, -1e6, -1e6))
    assert update.samples[0].advantages.tolist() == [0.0, 1.5e6, 1.5e6]


def test_marked_rows_never_enter(tmp_path: Path) -> None:
    """Of a good trajectory its other rows do; one of marked rows alone stays out, reward or not."""
    rows = [[make_turn()], [make_turn()]]
    trajectories = [make_trajectory("g", member, rows) for member in range(3)]
    members = tuple(
        ScoredTrajectory(trajectory=trajectory, reward=reward)
        for trajectory, reward in zip(trajectories, (WIN, WIN, LOSS), strict=True)
    )
    group = ScoredGroup(group_id="g", prompt=make_prompt("g"), members=members)
    marked = frozenset({(trajectories[0].id, 1), (trajectories[1].id, 0), (trajectories[1].id, 1)})
    hook, ctx = _hook(tmp_path), _ctx(1)
    hook.on_scored(ctx, (group,))
    advantages = turn_advantages([group], AlgorithmSection(), 0.0)
    hook.on_samples(ctx, make_samples([group], advantages, marked))
    assert hook.metrics()["replay/inserted"] == 1
    hook.on_step_end(ctx, StepReport(step=1, policy_version=1, metrics={}))
    (update,), _ = _run_step(hook, 2, (make_group("low", [LOSS, LOSS], policy_version=1),))
    assert [(str(s.trajectory_id), s.segment) for s in update.samples] == [("g/0", 0)]


def test_without_weight_nothing_is_spent(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    _run_step(hook, 1)
    updates, metrics = _run_step(hook, 2, replay_weight=0.0)
    assert updates == [] and metrics["replay/rows"] == 0 and metrics["replay/stored"] == 3


def test_rows_per_step_capacity_and_age(tmp_path: Path) -> None:
    hook = _hook(tmp_path, rows_per_step=1, capacity=5, max_age=2)
    replayed = []
    for step in range(1, 12):
        updates, metrics = _run_step(hook, step)
        ages = [step - 1 - sample.policy_version for u in updates for sample in u.samples]
        assert len(ages) == (step > 1) and all(1 <= age <= 2 for age in ages)
        assert metrics["replay/stored"] <= 5 and len(_stored(hook, tmp_path)) <= 5
        replayed += _replayed(updates)
    assert len(set(replayed)) == len(replayed), "each row is replayed once"
    nothing = tuple(make_group(f"x-{i}", [LOSS, LOSS]) for i in range(3))
    for step in range(12, 15):
        _run_step(hook, step, nothing, replay_weight=0.0)
    assert _stored(hook, tmp_path) == [], "aged rows leave even when nothing is inserted"


@pytest.mark.parametrize(
    "changes",
    [
        {"rows_per_step": 2},
        {"rows_per_step": 2, "max_age": 2, "baseline": "per_prompt", "baseline_history": 4},
        {"rows_per_step": 2, "capacity": 4, "baseline": "none"},
        {"release": "burst", "capacity": 5},
    ],
    ids=["default", "per_prompt", "none", "burst"],
)
def test_resume_equals_not_stopping(tmp_path: Path, changes: dict[str, Any]) -> None:
    straight = _hook(tmp_path / "straight", **changes)
    stopped = _hook(tmp_path / "stopped", **changes)
    for step in range(1, 5):
        _run_step(straight, step)
        _run_step(stopped, step)
    state = json.loads(json.dumps(stopped.state_dict()))
    for step in range(5, 8):
        _run_step(stopped, step, _groups(step, count=5))  # an abandoned future
    resumed = _hook(tmp_path / "stopped", **changes)
    resumed.load_state_dict(state)
    replayed = 0
    for step in range(5, 11):
        (expected, expected_metrics), (got, metrics) = (
            _run_step(straight, step),
            _run_step(resumed, step),
        )
        assert _replayed(got) == _replayed(expected)
        assert metrics == expected_metrics
        pairs = [(a.samples, b.samples) for a, b in zip(got, expected, strict=True)]
        for left, right in (pair for both in pairs for pair in zip(*both, strict=True)):
            np.testing.assert_array_equal(left.advantages, right.advantages)
            np.testing.assert_array_equal(left.old_logprobs, right.old_logprobs)
            replayed += 1
    assert replayed >= 5
    assert resumed.state_dict() == straight.state_dict()


def test_state_only_between_steps_and_strict(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    hook.on_scored(_ctx(1), _groups(1))
    with pytest.raises(AssertionError, match="between steps"):
        hook.state_dict()
    with pytest.raises(CheckpointError, match="SelfImitationHook"):
        hook.load_state_dict({"store": {}})
    hook.on_step_end(_ctx(1), StepReport(step=1, policy_version=1, metrics={}))
    state = hook.state_dict()
    del state["num_releases"]
    with pytest.raises(CheckpointError, match=r"missing \['num_releases'\]"):
        hook.load_state_dict(state)


def test_base_hook_does_nothing() -> None:
    hook = Hook()
    updates, metrics = _run_step(hook, 1)
    assert updates == [] and metrics == {} and hook.state_dict() == {}
    with pytest.raises(CheckpointError, match=r"unknown \['x'\]"):
        hook.load_state_dict({"x": 1})
