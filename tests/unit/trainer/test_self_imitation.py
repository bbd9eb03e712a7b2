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
from megatron_spear.errors import CheckpointError
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import make_group
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.trainer.hooks.self_imitation import SelfImitationHook
from megatron_spear.types import (
    Coefficients,
    Origin,
    Reward,
    ScoredGroup,
    StepContext,
    StepReport,
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
) -> tuple[list[Update], dict[str, float]]:
    ctx = _ctx(step, replay_weight)
    groups = hook.on_scored(ctx, _groups(step) if groups is None else groups)
    advantages = turn_advantages(groups, AlgorithmSection(), ctx.coefficients.intrinsic_weight)
    samples = make_samples(groups, advantages)
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
    store = ReplayStore(folder, 50)
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


def test_resume_equals_not_stopping(tmp_path: Path) -> None:
    straight = _hook(tmp_path / "straight", rows_per_step=2)
    stopped = _hook(tmp_path / "stopped", rows_per_step=2)
    for step in range(1, 5):
        _run_step(straight, step)
        _run_step(stopped, step)
    state = json.loads(json.dumps(stopped.state_dict()))
    for step in range(5, 8):
        _run_step(stopped, step, _groups(step, count=5))  # an abandoned future
    resumed = _hook(tmp_path / "stopped", rows_per_step=2)
    resumed.load_state_dict(state)
    for step in range(5, 10):
        (expected, expected_metrics), (got, metrics) = (
            _run_step(straight, step),
            _run_step(resumed, step),
        )
        assert _replayed(got) == _replayed(expected) and _replayed(got)
        assert metrics == expected_metrics
        for left, right in zip(got[0].samples, expected[0].samples, strict=True):
            np.testing.assert_array_equal(left.advantages, right.advantages)
            np.testing.assert_array_equal(left.old_logprobs, right.old_logprobs)
    assert resumed.state_dict() == straight.state_dict()


def test_state_only_between_steps_and_strict(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    hook.on_scored(_ctx(1), _groups(1))
    with pytest.raises(AssertionError, match="between steps"):
        hook.state_dict()
    with pytest.raises(CheckpointError, match="SelfImitationHook"):
        hook.load_state_dict({"store": {}})


def test_base_hook_does_nothing() -> None:
    hook = Hook()
    updates, metrics = _run_step(hook, 1)
    assert updates == [] and metrics == {} and hook.state_dict() == {}
    with pytest.raises(CheckpointError, match=r"unknown \['x'\]"):
        hook.load_state_dict({"x": 1})
