"""The official replay as a hook: its buffer decides, its rows come from disk, resume is exact."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.errors import CheckpointError
from megatron_spear.replay.official import (
    OfficialReplayBuffer,
    OfficialReplayRules,
    OfficialRows,
    keyed_permutation,
)
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.trainer.hooks.official_replay import OfficialReplayHook
from megatron_spear.types import (
    Coefficients,
    Reward,
    StepContext,
    StepReport,
    TrainSample,
    Update,
)

CAPACITY, GROUP, STEPS = 4, 4, 12


def _ctx(step: int) -> StepContext:
    return StepContext(
        step=step,
        policy_version=step - 1,
        coefficients=Coefficients(intrinsic_weight=1.0 / step, replay_weight=0.25),
        seed=5,
    )


def _rows(step: int) -> list[TrainSample]:
    """Three groups of four rows, drawn; rewards with an intrinsic part, advantages by group."""
    draw = np.random.default_rng(step)
    rows = []
    for group in range(3):
        rewards = [
            Reward(outcome=float(draw.integers(2)), intrinsic=float(draw.random()))
            for _ in range(GROUP)
        ]
        totals = [reward.total(1.0 / step) for reward in rewards]
        for member, (reward, total) in enumerate(zip(rewards, totals, strict=True)):
            rows.append(
                make_sample(
                    f"{step}-{group}",
                    member,
                    mask=[0, 1, 1, 0],
                    advantage=total - float(np.mean(totals)),
                    reward=reward,
                    tool_calls=int(draw.integers(2)),
                )
            )
    return rows


def _hook(folder: Path, tree: str = "agent", **replay: Any) -> OfficialReplayHook:
    section = ReplaySection(
        **({"capacity": CAPACITY, "baseline_history": 9, "max_age": 3} | replay)
    )
    algorithm = AlgorithmSection(compat="official", official={"tree": tree})
    return OfficialReplayHook(section, algorithm, GROUP, folder)


def _step(hook: OfficialReplayHook, step: int) -> tuple[list[Update], dict[str, float]]:
    ctx = _ctx(step)
    hook.on_samples(ctx, _rows(step))
    updates = hook.extra_updates(ctx)
    metrics = hook.metrics()
    hook.on_step_end(ctx, StepReport(step=step, policy_version=step, metrics=metrics))
    return updates, metrics


@pytest.mark.parametrize("tree", ["agent", "math"])
def test_replays_what_the_buffer_releases(tree: str, tmp_path: Path) -> None:
    """Against the buffer alone, which the recorded scenarios hold to the official code."""
    hook = _hook(tmp_path, tree)
    buffer = OfficialReplayBuffer(
        OfficialReplayRules(
            tree=tree, capacity=CAPACITY, max_history_groups=9, tolerate_steps=3, group_size=GROUP
        )
    )
    releases = 0
    for step in range(1, STEPS + 1):
        release = buffer.take(keyed_permutation(5, step))
        updates, metrics = _step(hook, step)
        got = [
            (f"{s.trajectory_id}", pytest.approx(float(s.advantages.max())))
            for u in updates
            for s in u.samples
        ]
        expected = (
            [
                (str(name), float(value))
                for name, value in zip(release.rows.row_ids, release.advantages[:, 0], strict=True)
            ]
            if release
            else []
        )
        assert got == expected
        releases += release is not None
        rows = _rows(step)
        buffer.add(
            step,
            OfficialRows(
                row_ids=np.array([str(r.trajectory_id) for r in rows]),
                uid=np.array([r.trajectory_id.group for r in rows]),
                rewards=np.array([r.reward.total(1.0 / step) for r in rows]),
                has_tool_call=np.array([r.tool_calls > 0 for r in rows]),
                mask=np.ones((len(rows), 2)),
                advantages=np.array([[float(r.advantages[1])] * 2 for r in rows]),
            ),
        )
        assert metrics["replay/rows"] == len(got)
        if updates:
            assert {u.weight for u in updates} == {0.25} and metrics["replay/stored"] == 0
    assert releases >= 2


def test_released_rows_are_the_stored_ones_with_new_advantages(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    seen = {str(s.trajectory_id): s for step in range(1, STEPS + 1) for s in _rows(step)}
    replayed = [s for step in range(1, STEPS + 1) for u in _step(hook, step)[0] for s in u.samples]
    assert replayed
    for sample in replayed:
        stored = seen[str(sample.trajectory_id)]
        values = set(sample.advantages[sample.response_mask].tolist())
        assert len(values) == 1 and min(values) >= 0
        assert sample.old_logprobs.tolist() == stored.old_logprobs.tolist()
        assert sample.reward == stored.reward


def test_stale_rows_leave_the_disk_with_the_buffer(tmp_path: Path) -> None:
    """What the buffer evicts is gone from the store too, so files can be pruned."""
    hook = _hook(tmp_path, capacity=10_000, max_age=1)
    for step in range(1, 6):
        _step(hook, step)
    state = hook.state_dict()
    kept = [i for chunk in state["buffer"]["chunks"] for i in chunk["rows"]["row_ids"]["values"]]
    assert [chunk["step"] for chunk in state["buffer"]["chunks"]] == [3, 4, 5]
    files = sorted(path.name for path in tmp_path.iterdir())
    hook.prune([state])
    assert len(list(tmp_path.iterdir())) == 3 < len(files)
    assert len(kept) == len(set(kept)) > 0


def test_a_resumed_hook_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    for step in range(1, 6):
        _step(hook, step)
    state = json.loads(json.dumps(hook.state_dict()))
    expected = [_step(hook, step) for step in range(6, STEPS + 1)]
    resumed = _hook(tmp_path)
    resumed.load_state_dict(state)
    found = [_step(resumed, step) for step in range(6, STEPS + 1)]
    assert [metrics for _, metrics in found] == [metrics for _, metrics in expected]
    for (one, _), (other, _) in zip(found, expected, strict=True):
        assert [[str(s.trajectory_id) for s in u.samples] for u in one] == [
            [str(s.trajectory_id) for s in u.samples] for u in other
        ]
    with pytest.raises(CheckpointError, match="missing"):
        resumed.load_state_dict({"buffer": {}})


def test_rows_without_sampled_tokens_never_enter(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    ctx = _ctx(1)
    empty = [replace(r, response_mask=np.zeros(4, bool)) for r in _rows(1)]
    hook.on_samples(ctx, [replace(r, advantages=np.zeros(4, np.float32)) for r in empty])
    hook.on_step_end(ctx, StepReport(step=1, policy_version=1, metrics={}))
    assert hook.state_dict()["buffer"]["chunks"] == []


def test_decay_is_the_official_mode_b(tmp_path: Path) -> None:
    """Every stored row may be drawn, its advantage times the factor; the baseline is not read."""
    hook = _hook(tmp_path, baseline="decay", decay=0.25)
    seen = {str(s.trajectory_id): s for step in range(1, STEPS + 1) for s in _rows(step)}
    replayed = [s for step in range(1, STEPS + 1) for u in _step(hook, step)[0] for s in u.samples]
    assert replayed
    for sample in replayed:
        stored = seen[str(sample.trajectory_id)]
        np.testing.assert_allclose(sample.advantages, 0.25 * stored.advantages, rtol=1e-6)


def test_the_factor_acts_with_decay_only(tmp_path: Path) -> None:
    """The default baseline recalibrates: not the stored advantages times the neutral factor."""
    hook = _hook(tmp_path)
    stored = {str(s.trajectory_id): s.advantages for t in range(1, STEPS + 1) for s in _rows(t)}
    replayed = [s for step in range(1, STEPS + 1) for u in _step(hook, step)[0] for s in u.samples]
    same = [np.allclose(s.advantages, stored[str(s.trajectory_id)]) for s in replayed]
    assert replayed and not all(same)
