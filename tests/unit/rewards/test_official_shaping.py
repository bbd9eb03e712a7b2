"""The agents' official shaping by hand."""

import numpy as np
import pytest

from megatron_spear.rewards.official_shaping import (
    official_turn_rewards,
    on_last_token,
    penalize_invalid,
    survival_bonus,
)


def test_surviving_is_paid_won_or_not() -> None:
    assert survival_bonus([1, 9, 10, 50]) == pytest.approx([0.1, 0.9, 1.0, 1.0])
    rewards = official_turn_rewards([10.0, 0.0], [29, 4], 0.5)
    assert rewards == pytest.approx([10.5, 0.2])
    normalized = official_turn_rewards([10.0, 0.0], [29, 4], 1.0, normalize_by_length=True)
    assert normalized == pytest.approx([10 / 29 + 1, 0.4])


def test_on_last_token() -> None:
    rows = on_last_token(np.array([2.0, 3.0]), np.array([1, 3]), 3)
    assert rows.tolist() == [[2, 0, 0], [0, 0, 3]] and rows.dtype == np.float32
    with pytest.raises(AssertionError, match="0 to width"):
        on_last_token(np.array([2.0]), np.array([4]), 3)


def test_a_row_without_response_tokens_is_paid_and_charged_on_its_last_column() -> None:
    assert on_last_token(np.array([2.0]), np.array([0]), 3).tolist() == [[0, 0, 2]]
    rewards, _, _ = penalize_invalid(np.zeros((1, 3)), np.array([0]), np.array([False]), 0.5)
    assert rewards.tolist() == [[0, 0, -0.5]]


def test_penalty_leaves_its_inputs_alone() -> None:
    rewards, returns = np.array([[0, 10], [1, 0]], np.float32), np.array([1, 2], np.float32)
    lengths, valid = np.array([2, 1]), np.array([False, True])
    got, got_returns, share = penalize_invalid(rewards, lengths, valid, 0.5, returns)
    assert got.tolist() == [[0, 9.5], [1, 0]]
    assert got_returns is not None and got_returns.tolist() == [0.5, 2]
    assert share == 0.5
    assert rewards[0, 1] == 10 and returns[0] == 1
