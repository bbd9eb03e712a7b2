"""The records' derived values, with the numbers of their docstrings."""

import numpy as np
import pytest

from megatron_spear.testing.hand_made import make_sample, make_trajectory, make_turn
from megatron_spear.types import Reward, Segment, Status, TrajectoryId, Turn, VersionSpan


def _turn(observation: list[int], action: list[int], logprobs: list[float]) -> Turn:
    return Turn(
        observation_tokens=np.array(observation, np.int32),
        action_tokens=np.array(action, np.int32),
        action_logprobs=np.array(logprobs, np.float32),
        finish_reason="stop",
        versions=(VersionSpan(0, len(action)),),
    )


def test_segment_by_hand() -> None:
    turns = (_turn([5, 6], [9], [-0.5]), _turn([7], [8, 2], [-0.25, -1.0]))
    segment = Segment(turns=turns)
    assert segment.num_tokens == 6
    assert segment.token_ids.tolist() == [5, 6, 9, 7, 8, 2]
    assert segment.response_mask.tolist() == [False, False, True, False, True, True]
    assert segment.rollout_logprobs.tolist() == [0, 0, -0.5, 0, -0.25, -1.0]
    assert segment.turn_starts.tolist() == [2, 4]
    assert segment.token_ids.dtype == segment.turn_starts.dtype == np.int32
    assert segment.response_mask.dtype == np.bool_
    assert segment.rollout_logprobs.dtype == np.float32


def test_segment_without_turns_is_empty() -> None:
    empty = Segment(turns=())
    assert empty.num_tokens == len(empty.token_ids) == len(empty.response_mask) == 0
    assert empty.token_ids.dtype == np.int32 and empty.response_mask.dtype == np.bool_


def test_a_turn_has_one_logprob_per_action_token() -> None:
    with pytest.raises(AssertionError, match="one log-prob per action token"):
        _turn([5], [9, 2], [-0.1])


def test_failures_are_no_results_of_the_policy() -> None:
    failed = {status.value for status in Status if status.failed}
    assert failed == {"failed_parse", "failed_tool", "failed_engine", "aborted"}


def test_reward_total_by_hand() -> None:
    reward = Reward(outcome=1, intrinsic=0.3, format=-0.1)
    assert reward.total(0.5) == pytest.approx(1.05)
    assert reward.total(0.0) == pytest.approx(0.9)


def test_trajectory_joins_its_segments() -> None:
    first, second = make_turn("look", num_tokens=2), make_turn("go", num_tokens=3)
    trajectory = make_trajectory("g", 1, ((first,), (second,)))
    assert trajectory.turns == (first, second) and trajectory.num_action_tokens == 5
    assert str(trajectory.id) == str(TrajectoryId(group="g", member=1)) == "g/1"


@pytest.mark.parametrize(
    "name", ["response_mask", "rollout_logprobs", "old_logprobs", "advantages"]
)
def test_a_sample_has_one_entry_per_token(name: str) -> None:
    with pytest.raises(AssertionError, match=name):
        make_sample(**{name: np.zeros(2, np.float32)})
