"""The official replay hook: the store holds the buffer's rows, no others, and resumes with it."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.config.method import AlgorithmSection, OfficialSection, ReplaySection
from megatron_spear.replay.store import ReplayStore
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.trainer.hooks.official_replay import OfficialReplayHook
from megatron_spear.types import Coefficients, Reward, StepContext, StepReport, Update


def _hook(folder: Path) -> OfficialReplayHook:
    replay = ReplaySection(capacity=2, max_age=2)
    official = OfficialSection(tree="agent")
    return OfficialReplayHook(replay, AlgorithmSection(official=official), 2, folder)


def _step(hook: OfficialReplayHook, step: int, advantages: Sequence[float]) -> list[Update]:
    """One step whose group has these advantages; rewards are 1 where they are positive."""
    coefficients = Coefficients(intrinsic_weight=0.0, replay_weight=0.5)
    ctx = StepContext(step=step, policy_version=step, coefficients=coefficients, seed=3)
    hook.on_samples(
        ctx,
        [
            make_sample(f"g{step}", member, advantage=a, reward=Reward(outcome=float(a > 0)))
            for member, a in enumerate(advantages)
        ],
    )
    updates = hook.extra_updates(ctx)
    hook.on_step_end(ctx, StepReport(step=step, policy_version=step + 1, metrics={}))
    return updates


def _stored(hook: OfficialReplayHook, folder: Path) -> list[str]:
    store = ReplayStore(folder, None)
    store.load_state_dict(hook.state_dict()["store"])
    return [str(rows[0].trajectory_id) for rows in store.take(store.index().row_ids)]


def test_only_good_rows_are_stored_and_a_release_clears_them(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    for step in (1, 2):
        assert _step(hook, step, (0.5, -0.5, 0.5, -0.5)) == []
        assert hook.metrics()["replay/rows"] == 0
    assert _stored(hook, tmp_path) == ["g1/0", "g1/2", "g2/0", "g2/2"]
    (update,) = _step(hook, 3, (0.5, -0.5))
    assert len(update.samples) == 2 and update.weight == 0.5, "4 > 1.5 * 2 rows: 2 are released"
    assert {str(sample.trajectory_id) for sample in update.samples} < {
        "g1/0",
        "g1/2",
        "g2/0",
        "g2/2",
    }
    assert _stored(hook, tmp_path) == ["g3/0"]


def test_rows_that_the_buffer_evicts_leave_the_store(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    for step in (1, 2, 5):
        _step(hook, step, (0.5, -0.5))
    _step(hook, 6, (-0.5, -0.5))
    assert _stored(hook, tmp_path) == ["g5/0"]


def test_resumed_as_if_not_stopped(tmp_path: Path) -> None:
    hook = _hook(tmp_path)
    for step in (1, 2):
        _step(hook, step, (0.5, -0.5, 0.5, -0.5))
    resumed = _hook(tmp_path)
    resumed.load_state_dict(json.loads(json.dumps(hook.state_dict())))
    (first,), (second,) = (_step(each, 3, (0.5, -0.5)) for each in (hook, resumed))
    assert [s.trajectory_id for s in first.samples] == [s.trajectory_id for s in second.samples]
    hook.prune([])
    assert len(list(tmp_path.iterdir())) == 1, "that of step 3"
