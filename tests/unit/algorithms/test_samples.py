"""Samples: one a segment, advantages on action tokens only."""

import numpy as np
import pytest

from megatron_spear.algorithms.samples import make_samples
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory


def test_one_sample_a_segment_with_turn_advantages() -> None:
    first = [make_turn("a", num_tokens=2, policy_version=3), make_turn("b", num_tokens=1)]
    second = [make_turn("c", num_tokens=3, policy_version=4)]
    trajectory = make_trajectory("g", 5, [first, second])
    group = ScoredGroup(
        group_id="g",
        prompt=make_prompt("g"),
        members=(ScoredTrajectory(trajectory=trajectory, reward=Reward(outcome=1.0)),),
    )
    samples = make_samples([group], {trajectory.id: np.array([0.5, -1.0, 2.0])})
    assert [(s.segment, s.num_segments, s.policy_version) for s in samples] == [
        (0, 2, 0),
        (1, 2, 4),
    ]
    assert samples[0].advantages.tolist() == [0, 0.5, 0.5, 0, -1.0]
    assert samples[0].response_mask.tolist() == [False, True, True, False, True]
    assert samples[0].turn_starts.tolist() == [1, 4]
    assert samples[0].anchors == ("before a", "before b")
    assert samples[1].advantages.tolist() == [0, 2, 2, 2]
    for sample in samples:
        assert sample.advantages.dtype == np.float32
        assert sample.prompt_id == "prompt-g" and sample.trajectory_id == trajectory.id
        np.testing.assert_array_equal(sample.old_logprobs, sample.rollout_logprobs)


def test_a_marked_row_is_context_and_nothing_more() -> None:
    first, second = [make_turn("a"), make_turn("b")], [make_turn("c", num_tokens=1)]
    mixed, silent = (make_trajectory("g", i, [first, second]) for i in range(2))
    members = [ScoredTrajectory(trajectory=t, reward=Reward(outcome=1.0)) for t in (mixed, silent)]
    group = ScoredGroup(group_id="g", prompt=make_prompt("g"), members=tuple(members))
    marked = frozenset({(mixed.id, 0), (silent.id, 0), (silent.id, 1)})
    # One that left the statistics has no advantages; where it stayed, its number goes nowhere.
    for known in ({}, {silent.id: np.array([3.0, 3.0, 3.0])}):
        samples = make_samples([group], {mixed.id: np.array([1.0, 1.0, 2.0]), **known}, marked)
        assert [s.response_mask.any() for s in samples] == [False, True, False, False]
        assert [s.advantages.tolist() for s in samples] == [[0] * 6, [0, 2], [0] * 6, [0] * 2]
        assert samples[0].token_ids.tolist() == mixed.segments[0].token_ids.tolist()
        assert samples[0].advantages.dtype == np.float32
    with pytest.raises(AssertionError, match="g/0 has no advantages"):
        make_samples([group], {}, marked)
