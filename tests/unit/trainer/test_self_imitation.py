"""The self-imitation hook over whole steps: order, admission, ages, exact resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_steps import (
    LOSS,
    WIN,
    lone_group,
    make_hook,
    replayed_rows,
    run_step,
    step_context,
    step_groups,
    stored_rows,
)

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.errors import CheckpointError, DataError
from megatron_spear.testing.hand_made import (
    make_group,
    make_prompt,
    make_sample,
    make_trajectory,
    make_turn,
)
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.types import (
    Origin,
    ScoredGroup,
    ScoredTrajectory,
    Segment,
    StepReport,
    Trajectory,
)


def test_a_step_replays_earlier_rows_only(tmp_path: Path) -> None:
    hook = make_hook(tmp_path)
    updates, metrics = run_step(hook, 1)
    assert updates == []
    assert metrics["replay/inserted"] == 3 and metrics["replay/stored"] == 0
    (update,), metrics = run_step(hook, 2)
    assert replayed_rows([update]) == ["1-0/1", "1-1/1", "1-2/1"]
    assert (update.origin, update.weight) == (Origin.REPLAY, 0.5)
    assert metrics["replay/rows"] == 3 and metrics["replay/weight"] == 0.5
    assert metrics["replay/kept_fraction"] == 1.0 and metrics["replay/age_mean"] == 1.0
    assert replayed_rows(run_step(hook, 3)[0]) == ["2-0/1", "2-1/1", "2-2/1"]


def test_advantages_are_recalibrated_and_old_logprobs_are_those_of_collection(
    tmp_path: Path,
) -> None:
    hook = make_hook(tmp_path)
    run_step(hook, 1)
    (update,), metrics = run_step(hook, 2)
    p50 = 0.25 + 0.5 * 0.1
    assert metrics["replay/p50"] == pytest.approx(p50)
    for sample in update.samples:
        assert sample.advantages.tolist() == pytest.approx([0, 1.05 - p50, 1.05 - p50])
        assert sample.old_logprobs[1:].tolist() == [-1.5, -1.5]
        assert sample.policy_version == 0


def test_only_rows_better_than_their_group_enter(tmp_path: Path) -> None:
    hook = make_hook(tmp_path)
    groups = (make_group("a", [LOSS, LOSS]), make_group("b", [WIN]), make_group("c", [WIN, LOSS]))
    run_step(hook, 1, groups)
    assert stored_rows(hook, tmp_path) == ["c/0"]


@pytest.mark.parametrize(("required", "stored"), [(True, 0), (False, 3)])
def test_valid_action_is_required(tmp_path: Path, required: bool, stored: int) -> None:
    hook = make_hook(tmp_path, require_valid_action=required)
    run_step(hook, 1, step_groups(1, valid=False))
    assert len(stored_rows(hook, tmp_path)) == stored


@pytest.mark.parametrize(("required", "stored"), [(True, ["a/1"]), (False, ["a/0", "a/1"])])
def test_a_tool_call_in_any_segment_is_required(
    tmp_path: Path, required: bool, stored: list[str]
) -> None:
    hook = make_hook(tmp_path, require_tool_call=required)
    hook.on_scored(step_context(1), (make_group("a", [WIN, WIN, LOSS, LOSS]),))
    calls = {(0, 0): 0, (0, 1): 0, (1, 0): 0, (1, 1): 2}
    samples = [
        make_sample("a", member, segment=segment, num_segments=2, tool_calls=count)
        for (member, segment), count in calls.items()
    ]
    hook.on_samples(step_context(1), samples)
    assert hook.metrics()["replay/inserted"] == len(stored)
    hook.on_step_end(step_context(1), StepReport(step=1, policy_version=1, metrics={}))
    assert stored_rows(hook, tmp_path) == stored


def test_metrics_of_a_step_with_replay(tmp_path: Path) -> None:
    """The names of the method's list; gamma, mu and what the loss gives are added elsewhere."""
    hook = make_hook(tmp_path, rows_per_step=2, capacity=4, max_age=2)
    called = tuple(
        replace(
            group,
            members=tuple(
                replace(m, trajectory=_with_tool_calls(m.trajectory, 4)) for m in group.members
            ),
        )
        for group in step_groups(1)
    )
    run_step(hook, 1, called)
    (update,), first = run_step(hook, 2)
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
    _, third = run_step(hook, 3, replay_weight=0.0)  # 1 + 3 are stored: 3 more do not fit
    assert third["replay/evicted_by_capacity"] == 0 and third["replay/num_releases"] == 1
    nothing = (make_group("x", [LOSS, LOSS]),)
    _, fourth = run_step(hook, 4, nothing, replay_weight=0.0)
    assert fourth["replay/evicted_by_capacity"] == 3
    assert fourth["replay/evicted_by_age"] == 0
    _, fifth = run_step(hook, 5, nothing, replay_weight=0.0)
    assert (fifth["replay/evicted_by_capacity"], fifth["replay/evicted_by_age"]) == (0, 1)


def _with_tool_calls(trajectory: Trajectory, count: int) -> Trajectory:
    """The one-turn trajectory with its call that many times."""
    (turn,) = trajectory.turns
    turn = replace(turn, tool_calls=turn.tool_calls * count)
    return replace(trajectory, segments=(Segment(turns=(turn,)),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(DataError, match="expected finite numbers"):
        run_step(make_hook(tmp_path), 1, lone_group(1, 1.0, value))


def test_large_rewards_are_replayed(tmp_path: Path) -> None:
    hook = make_hook(tmp_path)
    run_step(hook, 1, lone_group(1, 1e6, -1e6))
    (update,), _ = run_step(hook, 2, lone_group(2, -1e6, -1e6))
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
    hook, ctx = make_hook(tmp_path), step_context(1)
    hook.on_scored(ctx, (group,))
    advantages = turn_advantages([group], AlgorithmSection(), 0.0)
    hook.on_samples(ctx, make_samples([group], advantages, marked))
    assert hook.metrics()["replay/inserted"] == 1
    hook.on_step_end(ctx, StepReport(step=1, policy_version=1, metrics={}))
    (update,), _ = run_step(hook, 2, (make_group("low", [LOSS, LOSS], policy_version=1),))
    assert [(str(s.trajectory_id), s.segment) for s in update.samples] == [("g/0", 0)]


def test_without_weight_nothing_is_spent(tmp_path: Path) -> None:
    hook = make_hook(tmp_path)
    run_step(hook, 1)
    updates, metrics = run_step(hook, 2, replay_weight=0.0)
    assert updates == [] and metrics["replay/rows"] == 0 and metrics["replay/stored"] == 3


def test_rows_that_stay_are_drawn_until_they_are_too_old(tmp_path: Path) -> None:
    hook = make_hook(tmp_path, reuse=True, max_age=2)
    run_step(hook, 1)
    run_step(hook, 2, ())
    (update,), metrics = run_step(hook, 3, ())
    assert replayed_rows([update]) == ["1-0/1", "1-1/1", "1-2/1"]
    assert metrics["replay/stored"] == 3 and metrics["replay/age_mean"] == 2.0
    assert metrics["replay/num_releases"] == 2
    updates, metrics = run_step(hook, 4, ())
    assert updates == [] and metrics["replay/evicted_by_age"] == 3


def test_rows_per_step_capacity_and_age(tmp_path: Path) -> None:
    hook = make_hook(tmp_path, rows_per_step=1, capacity=5, max_age=2)
    replayed = []
    for step in range(1, 12):
        updates, metrics = run_step(hook, step)
        ages = [step - 1 - sample.policy_version for u in updates for sample in u.samples]
        assert len(ages) == (step > 1) and all(1 <= age <= 2 for age in ages)
        assert metrics["replay/stored"] <= 5 and len(stored_rows(hook, tmp_path)) <= 5
        replayed += replayed_rows(updates)
    assert len(set(replayed)) == len(replayed), "each row is replayed once"
    nothing = tuple(make_group(f"x-{i}", [LOSS, LOSS]) for i in range(3))
    for step in range(12, 15):
        run_step(hook, step, nothing, replay_weight=0.0)
    assert stored_rows(hook, tmp_path) == [], "aged rows leave even when nothing is inserted"


@pytest.mark.parametrize(
    "changes",
    [
        {"rows_per_step": 2},
        {"rows_per_step": 2, "max_age": 2, "baseline": "per_prompt", "baseline_history": 4},
        {"rows_per_step": 2, "capacity": 4, "baseline": "none"},
        {"release": "burst", "capacity": 5},
        {"rows_per_step": 2, "reuse": True},
    ],
    ids=["default", "per_prompt", "none", "burst", "reuse"],
)
def test_resume_equals_not_stopping(tmp_path: Path, changes: dict[str, Any]) -> None:
    straight = make_hook(tmp_path / "straight", **changes)
    stopped = make_hook(tmp_path / "stopped", **changes)
    for step in range(1, 5):
        run_step(straight, step)
        run_step(stopped, step)
    state = json.loads(json.dumps(stopped.state_dict()))
    for step in range(5, 8):
        run_step(stopped, step, step_groups(step, count=5))  # an abandoned future
    resumed = make_hook(tmp_path / "stopped", **changes)
    resumed.load_state_dict(state)
    replayed = 0
    for step in range(5, 11):
        (expected, expected_metrics), (got, metrics) = (
            run_step(straight, step),
            run_step(resumed, step),
        )
        assert replayed_rows(got) == replayed_rows(expected)
        assert metrics == expected_metrics
        pairs = [(a.samples, b.samples) for a, b in zip(got, expected, strict=True)]
        for left, right in (pair for both in pairs for pair in zip(*both, strict=True)):
            np.testing.assert_array_equal(left.advantages, right.advantages)
            np.testing.assert_array_equal(left.old_logprobs, right.old_logprobs)
            replayed += 1
    assert replayed >= 5
    assert resumed.state_dict() == straight.state_dict()


def test_state_only_between_steps_and_strict(tmp_path: Path) -> None:
    hook = make_hook(tmp_path)
    hook.on_scored(step_context(1), step_groups(1))
    with pytest.raises(AssertionError, match="between steps"):
        hook.state_dict()
    with pytest.raises(CheckpointError, match="SelfImitationHook"):
        hook.load_state_dict({"store": {}})
    hook.on_step_end(step_context(1), StepReport(step=1, policy_version=1, metrics={}))
    state = hook.state_dict()
    del state["num_releases"]
    with pytest.raises(CheckpointError, match=r"missing \['num_releases'\]"):
        hook.load_state_dict(state)


def test_base_hook_does_nothing() -> None:
    hook = Hook()
    updates, metrics = run_step(hook, 1)
    assert updates == [] and metrics == {} and hook.state_dict() == {}
    with pytest.raises(CheckpointError, match=r"unknown \['x'\]"):
        hook.load_state_dict({"x": 1})
