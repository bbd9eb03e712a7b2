"""Selection by hand: recalibrate, age, draw."""

import numpy as np
import pytest

from megatron_spear.replay.baseline import BaselineHistory
from megatron_spear.replay.selection import Selection, baseline_values, recalibrated, select
from megatron_spear.replay.store import ReplayRow
from megatron_spear.testing.hand_made import make_group, make_sample
from megatron_spear.types import Coefficients, Reward, StepContext, TrajectoryId


def _ctx(*, step: int = 1, seed: int = 0, version: int = 10, weight: float = 0.0) -> StepContext:
    coefficients = Coefficients(intrinsic_weight=weight, replay_weight=1.0)
    return StepContext(step=step, policy_version=version, coefficients=coefficients, seed=seed)


def _row(row_id: int, reward: Reward | float = 1.0, version: int = 10) -> ReplayRow:
    return ReplayRow(
        row_id=row_id,
        trajectory_id=TrajectoryId(group="g", member=row_id),
        reward=reward if isinstance(reward, Reward) else Reward(outcome=reward),
        policy_version=version,
        file=0,
        offset=0,
        size=0,
    )


def _select(rows: list[ReplayRow], ctx: StepContext, baseline: float, limit: int = 99) -> Selection:
    return select(rows, [baseline] * len(rows), ctx, max_age=5, max_rows=limit)


def test_keeps_only_what_beats_the_baseline() -> None:
    rows = [_row(0, 1.0), _row(1, 0.5), _row(2, 0.4), _row(3, 2.0)]
    selection = _select(rows, _ctx(), 0.5)
    assert selection.row_ids == (0, 3) and selection.advantages == (0.5, 1.5)
    assert selection.metrics["replay/kept_fraction"] == 0.5
    assert selection.metrics["replay/num_candidates"] == 4
    assert selection.metrics["replay/advantage_mean"] == 1.0


def test_rewards_are_weighed_with_the_current_intrinsic_weight() -> None:
    rows = [_row(0, Reward(outcome=0.0, intrinsic=1.0)), _row(1, Reward(outcome=0.6))]
    assert _select(rows, _ctx(weight=1.0), 0.5).row_ids == (0, 1)
    assert _select(rows, _ctx(weight=0.0), 0.5).row_ids == (1,)


def test_age_is_measured_at_release() -> None:
    rows = [_row(0, version=4), _row(1, version=5), _row(2, version=9)]
    selection = _select(rows, _ctx(version=10), 0.0)
    assert selection.row_ids == (1, 2)
    assert selection.metrics["replay/age_mean"] == 3.0
    assert selection.metrics["replay/num_candidates"] == 2


def test_nothing_to_replay() -> None:
    for rows in ([], [_row(0, version=0)], [_row(0, -1.0)]):
        selection = _select(rows, _ctx(), 0.0)
        assert selection.row_ids == () and selection.metrics["replay/rows"] == 0


def test_draw_is_limited_uniform_and_keyed() -> None:
    rows = [_row(i) for i in range(10)]
    counts = np.zeros(10)
    for step in range(500):
        selection = _select(rows, _ctx(step=step), 0.0, limit=4)
        assert list(selection.row_ids) == sorted(set(selection.row_ids))
        counts[list(selection.row_ids)] += 1
    assert counts.sum() == 2000
    assert abs(counts - 200).max() < 55  # 5 standard deviations
    draws = {_select(rows, _ctx(seed=seed), 0.0, limit=4).row_ids for seed in range(20)}
    assert len(draws) > 10


def test_draw_does_not_depend_on_the_order_or_on_rows_not_kept() -> None:
    rows = [_row(i) for i in range(10)]
    chosen = set(_select(rows, _ctx(), 0.0, limit=3).row_ids)
    others = [_row(100 + i, -1.0) for i in range(5)]
    assert set(_select([*others, *rows[::-1]], _ctx(), 0.0, limit=3).row_ids) == chosen


def test_p50_is_the_same_for_all_rows() -> None:
    history = BaselineHistory(8)
    history.extend(1, [make_group("a", [1.0]), make_group("b", [0.0])])
    assert baseline_values("p50", history, [_row(0), _row(1)], 0.0) == [0.5, 0.5]
    assert baseline_values("p50", BaselineHistory(8), [], 0.0) == []


def test_recalibrated_changes_the_advantages_alone() -> None:
    sample = make_sample(mask=[0, 1, 0, 1], advantage=3.0)
    (result,) = recalibrated([sample], 0.25)
    assert result.advantages.tolist() == pytest.approx([0, 0.25, 0, 0.25])
    assert result.advantages.dtype == np.float32
    assert result.old_logprobs is sample.old_logprobs
