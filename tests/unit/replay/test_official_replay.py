"""The official replay buffer: its rules and its defects on hand-made rows."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_spear.errors import CheckpointError
from megatron_spear.replay.official import (
    OfficialReplayBuffer,
    OfficialReplayRules,
    OfficialRows,
    keyed_permutation,
    power_of_two_cut,
)


def in_order(count: int) -> np.ndarray:
    return np.arange(count)


def rules(**changes: Any) -> OfficialReplayRules:
    base: dict[str, Any] = {
        "tree": "math",
        "capacity": 2,
        "max_history_groups": 100,
        "tolerate_steps": 2,
        "group_size": 2,
    }
    return OfficialReplayRules(**(base | changes))


def pairs(step: int, *rewards: float, **changes: Any) -> OfficialRows:
    """Groups of two with these rewards, ids 10 * step + position, one token of two masked in."""
    values = np.array(rewards, np.float64)
    centred = values - np.repeat(values.reshape(-1, 2).mean(1), 2)
    mask = np.tile([1.0, 0.0], (len(values), 1))
    columns: dict[str, Any] = {
        "row_ids": np.arange(len(values)) + 10 * step,
        "uid": np.repeat(np.arange(len(values) // 2), 2),
        "traj_uid": np.arange(len(values)),
        "rewards": values,
        "has_tool_call": np.ones(len(values), np.bool_),
        "mask": mask,
        "advantages": centred[:, None] * mask,
    }
    return OfficialRows(**(columns | changes))


def test_staleness_is_measured_from_the_newest_chunk_and_before_insertion() -> None:
    buffer = OfficialReplayBuffer(rules(tolerate_steps=1, capacity=100))
    buffer.add(1, pairs(1, 1, 0))
    buffer.add(5, pairs(5, 1, 1))  # nothing good: nothing is inserted
    buffer.add(6, pairs(6, 1, 0))
    assert buffer.steps == [1, 6]  # five steps old at a limit of one
    buffer.add(7, pairs(7, 1, 0))
    assert buffer.steps == [6, 7]


def test_staleness_limits_above_ten_act_as_ten() -> None:
    buffer = OfficialReplayBuffer(rules(tolerate_steps=50, capacity=100))
    for step in (1, 11, 12):
        buffer.add(step, pairs(step, 1, 0))
    assert buffer.steps == [1, 11, 12]
    buffer.add(13, pairs(13, 1, 0))
    assert buffer.steps == [11, 12, 13]


def test_a_release_wastes_what_the_power_of_two_leaves_and_clears_the_rest() -> None:
    buffer = OfficialReplayBuffer(rules(capacity=4))
    buffer.add(1, pairs(1, *([1, 0] * 7)))
    assert (len(buffer), buffer.count()) == (7, 7)
    release = buffer.take(in_order)
    assert release is not None
    assert (release.num_stored, release.num_kept) == (7, 7)
    assert release.rows.row_ids.tolist() == [10, 12, 14, 16]
    assert release.baseline == 0.5
    np.testing.assert_array_equal(release.advantages, [[0.5, 0.0]] * 4)
    assert len(buffer) == 0
    assert buffer.take(in_order) is None


@pytest.mark.parametrize(
    ("num_kept", "capacity", "size"),
    [(0, 8, 0), (1, 8, 0), (2, 8, 2), (7, 8, 4), (8, 8, 8), (40, 8, 8), (40, 6, 6)],
)
def test_power_of_two_cut(num_kept: int, capacity: int, size: int) -> None:
    got = power_of_two_cut(num_kept, capacity, keyed_permutation(3, 1))
    assert len(set(got.tolist())) == size
    assert got.tolist() == sorted(got.tolist())
    assert all(0 <= position < num_kept for position in got)


def test_the_keyed_draw_depends_on_seed_and_step_alone() -> None:
    draw = keyed_permutation(3, 1)(20).tolist()
    assert sorted(draw) == list(range(20))
    assert draw == keyed_permutation(3, 1)(20).tolist()
    assert draw != keyed_permutation(3, 2)(20).tolist()
    assert draw != keyed_permutation(4, 1)(20).tolist()


def test_full_means_strictly_more_than_one_and_a_half_capacities() -> None:
    buffer = OfficialReplayBuffer(rules(capacity=2))
    buffer.add(1, pairs(1, 1, 0, 1, 0, 1, 0))
    assert buffer.count() == 3
    assert not buffer.is_full()
    assert buffer.take(in_order) is None
    assert len(buffer) == 3


def test_rewards_at_the_median_are_kept_by_the_agent_tree_but_counted_by_neither() -> None:
    """Four rewards above P50 make both full; the tie (0.5) is released by ``agent`` only."""
    kept = {}
    for tree in ("math", "agent"):
        buffer = OfficialReplayBuffer(rules(tree=tree, capacity=2))
        # Group means 0.25, 0.5, 0.5, 0.5, 0.5: P50 0.5.
        buffer.add(1, pairs(1, 0.5, 0, 1, 0, 1, 0, 1, 0, 1, 0))
        assert (len(buffer), buffer.count()) == (5, 4)
        release = buffer.take(in_order)
        assert release is not None
        kept[tree] = release.num_kept
    assert kept == {"math": 4, "agent": 5}


def test_a_small_release_is_dropped_and_the_buffer_cleared_all_the_same() -> None:
    buffer = OfficialReplayBuffer(rules(capacity=2, min_released_rows=3))
    buffer.add(1, pairs(1, *([1, 0] * 4)))
    assert buffer.is_full()
    assert buffer.take(in_order) is None
    assert len(buffer) == 0


def test_decay_scales_stored_advantages_and_counts_every_row() -> None:
    buffer = OfficialReplayBuffer(rules(capacity=2, weight_decay=0.5))
    buffer.add(1, pairs(1, 9, 8, 1, 0, 1, 0, 0.2, 0))  # 0.2 is below P50
    assert buffer.count() == 4
    release = buffer.take(lambda count: np.array([3, 0, 1, 2]))
    assert release is not None
    assert release.rows.row_ids.tolist() == [10, 16]
    np.testing.assert_allclose(release.advantages, [[0.25, 0.0], [0.05, 0.0]])


@pytest.mark.parametrize(("weight_decay", "decays"), [(-1, 0), (0, 0), (0.1, 1), (1, 1), (1.1, 0)])
def test_weight_decay_acts_above_zero_up_to_one(weight_decay: float, decays: int) -> None:
    assert rules(weight_decay=weight_decay).decays is bool(decays)


def test_only_the_math_tree_asks_for_a_tool_call_and_neither_takes_masked_rows() -> None:
    no_tool = np.array([False, True, True, True])
    stored = {}
    for tree in ("math", "agent"):
        buffer = OfficialReplayBuffer(rules(tree=tree))
        buffer.add(1, pairs(1, 1, 0, 1, 0, has_tool_call=no_tool))
        buffer.add(2, pairs(2, 1, 0, advantages=np.zeros((2, 2))))
        stored[tree] = buffer.row_ids
    assert stored == {"math": [12], "agent": [10, 12]}


def test_groups_are_blocks_with_unbiased_std_or_uids_with_biased_std() -> None:
    mixed = pairs(1, 1, 0, 1, 0, uid=np.array(["a", "b", "a", "b"]))
    found = {}
    for tree in ("math", "agent"):
        buffer = OfficialReplayBuffer(rules(tree=tree))
        buffer.add(1, mixed)
        found[tree] = (buffer.group_means, buffer.group_stds)
    root = 0.5**0.5
    assert found["math"] == ([(1, [0.5, 0.5])], [(1, pytest.approx([root, root]))])
    assert found["agent"] == ([(1, [1.0, 0.0])], [(1, [0.0, 0.0])])


def test_the_agents_history_counts_a_trajectory_once() -> None:
    """Prompt a: a long trajectory of mean 0 and a short one of 1; b: a single one of mean 2."""
    rows = pairs(1, 0, 0, 0, 1, 1, 3, uid=np.array(list("aaaabb")))
    rows = replace(rows, traj_uid=np.array(["a0", "a0", "a0", "a1", "b0", "b0"]))
    buffer = OfficialReplayBuffer(rules(tree="agent"))
    buffer.add(1, rows)
    assert buffer.group_means == [(1, [0.5, 2.0])]
    assert buffer.group_stds == [(1, [0.5, 0.0])]


def test_p50_of_float32_rewards_is_taken_in_float64() -> None:
    """Between -0.9 and 1.3 lies the float32 below 0.2; in float32 it would be the third above."""
    values = [-0.9, -0.9, 1.3, 1.3, 0.2, -5, 9, 9]
    buffer = OfficialReplayBuffer(rules(capacity=100))
    buffer.add(1, pairs(1, *values, rewards=np.array(values, np.float32)))
    assert buffer.row_ids == [14]
    assert buffer.count() == 1


@pytest.mark.parametrize(("tree", "tied"), [("math", False), ("agent", True)])
def test_equal_float32_rewards_tie_with_their_mean_where_it_is_taken_in_float64(
    tree: str, tied: bool
) -> None:
    """Three rewards of 0.9 have a float32 mean 2^-24 below them, a float64 mean that ties."""
    rewards = np.array([0.9, 0.9, 0.9, 0.9, -5, -5, 9, 9, 9], np.float32)
    columns: dict[str, Any] = {
        "row_ids": np.arange(9),
        "uid": np.repeat(np.arange(3), 3),
        "traj_uid": np.arange(9),
        "rewards": rewards,
        "has_tool_call": np.ones(9, np.bool_),
        "mask": np.ones((9, 1)),
        "advantages": (np.arange(9) == 3).astype(float)[:, None],
    }
    buffer = OfficialReplayBuffer(rules(tree=tree, group_size=3))
    buffer.add(1, OfficialRows(**columns))
    assert buffer.row_ids == [3]
    assert buffer.count() == int(not tied)


def test_the_history_drops_whole_steps_and_may_exceed_its_limit_by_one() -> None:
    buffer = OfficialReplayBuffer(rules(max_history_groups=3, capacity=100))
    lengths = []
    for step in range(1, 5):
        buffer.add(step, pairs(step, 1, 0, 1, 0))
        lengths.append([entry[0] for entry in buffer.group_means])
    assert lengths == [[1], [1, 2], [2, 3], [3, 4]]


def test_a_release_uses_the_history_of_earlier_steps() -> None:
    buffer = OfficialReplayBuffer(rules(capacity=1))
    buffer.add(1, pairs(1, 1, 0, 1, 0))
    release = buffer.take(in_order)
    assert release is not None
    assert release.baseline == 0.5
    buffer.add(2, pairs(2, 9, 8, 9, 8))
    later = buffer.take(in_order)
    assert later is not None
    assert later.baseline == 4.5  # of 0.5, 0.5, 8.5, 8.5


def test_rows_that_form_no_groups_are_refused() -> None:
    buffer = OfficialReplayBuffer(rules(group_size=4))
    with pytest.raises(ValueError, match=r"got 2 rows, expected whole groups of 4"):
        buffer.add(1, pairs(1, 1, 0))
    with pytest.raises(ValueError, match="a step without rows"):
        buffer.add(1, pairs(1, 1, 0).pick(np.zeros(2, np.bool_)))


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns differ in length: .*'uid': 3"):
        pairs(1, 1, 0, uid=np.arange(3))
    with pytest.raises(ValueError, match="got rewards of int64, expected floats"):
        pairs(1, 1, 0, rewards=np.array([1, 0]))


def test_a_restored_buffer_goes_on_as_the_saved_one() -> None:
    """Saved to JSON with float32 rewards and named prompts, then driven alike to a release."""
    saved = OfficialReplayBuffer(rules(capacity=2, normalize_std=True))
    rewards = np.array([0.1, 0, 0.7, 0], np.float32)
    saved.add(1, pairs(1, 0.1, 0, 0.7, 0, rewards=rewards, uid=np.array(["a", "a", "b", "b"])))
    restored = OfficialReplayBuffer(rules(capacity=2, normalize_std=True))
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    releases = []
    for buffer in (saved, restored):
        assert buffer.take(in_order) is None
        buffer.add(2, pairs(2, 1, 0, 1, 0, 1, 0))
        releases.append(buffer.take(in_order))
    first, second = releases
    assert first is not None
    assert second is not None
    assert first.rows.row_ids.tolist() == second.rows.row_ids.tolist()
    assert (first.baseline, first.scale) == (second.baseline, second.scale)
    np.testing.assert_array_equal(first.advantages, second.advantages)
    assert restored.state_dict() == saved.state_dict()
    with pytest.raises(CheckpointError, match="unknown"):
        restored.load_state_dict({"chunks": [], "history": [], "more": 1})
