"""The official group filters by hand and against slow loops."""

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.official.filters import (
    drop_equal_blocks,
    keep_spread_blocks,
    keep_spread_prompts,
    power_of_two_cut,
    shuffled,
)


def test_blocks_of_highest_and_lowest_spread() -> None:
    scores = [0, 1, 5, 5, 2, 4, 0, 0]
    rows, metrics = keep_spread_blocks(scores, 2, 0.5)
    assert rows.tolist() == [0, 1, 4, 5]
    assert keep_spread_blocks(scores, 2, 0.5, "lowest")[0].tolist() == [2, 3, 6, 7]
    assert metrics["filter/best_mean"] == 10 / 4 and metrics["filter/kept_best_mean"] == 2.5
    assert metrics["filter/spread_mean"] == pytest.approx((0.5**0.5 + 2**0.5) / 4)
    assert metrics["filter/score_max"] == 5 and metrics["filter/kept_score_mean"] == 1.75


@pytest.mark.parametrize(("count", "kept"), [(5, 3), (8, 6), (10, 7), (100, 75)])
def test_ties_of_blocks_fall_as_torch_ranks_them(count: int, kept: int) -> None:
    named = torch.zeros(count).topk(kept).indices.tolist()
    for keep in ("highest", "lowest"):
        rows, _ = keep_spread_blocks([0, 1] * count, 2, kept / count, keep)
        assert rows[::2].tolist() == [2 * block for block in sorted(named)]


def test_ties_of_prompts_go_to_the_earlier_one() -> None:
    scores, prompts = [0, 1] * 5, [f"p{i // 2}" for i in range(10)]
    for keep in ("highest", "lowest"):
        _, kept, _ = keep_spread_prompts(scores, prompts, list("ab" * 5), 0.7, keep)
        assert kept == ("p0", "p1", "p2")


def test_spreads_of_blocks_are_compared_in_float32() -> None:
    # 1e-9 is lost beside 1: the two blocks tie and topk names the first
    scores = [0, 1, 0, 1 + 1e-9]
    assert keep_spread_blocks(scores, 2, 0.5)[0].tolist() == [0, 1]
    assert keep_spread_prompts(scores, list("aabb"), list("wxyz"), 0.5)[1] == ("b",)


def test_the_count_is_floored() -> None:
    assert len(keep_spread_blocks([0, 1] * 100, 2, 0.29)[0]) == 2 * 28  # 0.29 * 100 < 29
    rows, metrics = keep_spread_blocks([0, 1, 0, 1], 2, 0.1)
    assert rows.tolist() == [] and "filter/kept_spread_mean" not in metrics


def test_groups_of_one_have_no_spread() -> None:
    assert keep_spread_blocks([3, 1, 2], 1, 0.7)[0].tolist() == [0, 1]


def test_a_trajectory_counts_once_however_many_rows_it_has() -> None:
    # prompt a: scores 0 and 2, spread 1 (as rows it would be 0.8); b: 0 and 1.8, spread 0.9
    scores = [0, 0, 0, 0, 2, 0, 1.8]
    prompts = ["a"] * 5 + ["b"] * 2
    trajectories = ["a0", "a0", "a0", "a0", "a1", "b0", "b1"]
    rows, kept, metrics = keep_spread_prompts(scores, prompts, trajectories, 0.5)
    assert kept == ("a",) and rows.tolist() == [0, 1, 2, 3, 4]
    assert metrics["filter/spread_mean"] == pytest.approx(0.95)
    assert metrics["filter/score_max"] == 1.0


def test_prompts_need_not_be_neighbours() -> None:
    rows, kept, _ = keep_spread_prompts([0, 5, 1, 5], list("abab"), ["a0", "b0", "a1", "b1"], 0.5)
    assert kept == ("a",) and rows.tolist() == [0, 2]


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 0), (2, 2), (3, 2), (8, 8), (15, 8)])
def test_power_of_two_cut(count: int, kept: int) -> None:
    order = shuffled(np.arange(count) * 3, 7, "cut")
    assert sorted(order) == [3 * i for i in range(count)]
    assert power_of_two_cut(order).tolist() == sorted(order[:kept])


def test_shuffle_depends_on_its_key_alone() -> None:
    rows = np.arange(50)
    assert shuffled(rows, 1, 2).tolist() == shuffled(rows, 1, 2).tolist()
    assert shuffled(rows, 1, 2).tolist() != shuffled(rows, 1, 3).tolist()


def test_equal_groups_are_dropped_unless_on_the_last_try() -> None:
    assert drop_equal_blocks([1, 1, 0, 1], 2).tolist() == [2, 3]
    assert drop_equal_blocks([1, 1, 0, 1], 2, last_try=True).tolist() == [0, 1, 2, 3]
    assert drop_equal_blocks([], 2).tolist() == []
    draw = np.random.default_rng(3)
    for size in (1, 2, 3):
        rewards = draw.integers(0, 2, 30 * size)
        groups = rewards.reshape(-1, size).tolist()
        expected = [
            index * size + at
            for index, group in enumerate(groups)
            for at in range(size)
            if len(set(group)) > 1
        ]
        assert drop_equal_blocks(rewards, size).tolist() == expected
