"""Defects 17 and 18 of the official code: there in official mode, gone in the default."""

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.official import advantages as official
from megatron_spear.algorithms.official.gigpo import (
    gigpo_advantage,
    gigpo_episode_advantage,
    gigpo_step_advantage,
    gigpo_step_labels,
)
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.testing.hand_made import make_group, make_prompt, make_trajectory, make_turn
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory, TrajectoryId


def _rows(*scores: float) -> tuple[np.ndarray, np.ndarray]:
    """Token rewards on the last of two tokens, and a full mask."""
    rewards = np.zeros((len(scores), 2))
    rewards[:, -1] = scores
    return rewards, np.ones_like(rewards)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "gigpo"])
def test_defect_17_a_group_of_one_keeps_its_raw_score(advantage: str) -> None:
    (rewards, mask), uid = _rows(0.7, 1.0, 0.0), np.array(["a", "b", "b"])
    if advantage == "rloo":
        values = official.rloo_advantage(rewards, mask, uid)
    elif advantage == "grpo":
        values = official.grpo_advantage(rewards, mask, uid, normalize_std=False)
    else:
        values = gigpo_advantage(
            rewards, rewards.sum(1), mask, np.array(["x", "y", "z"]), uid, uid, mode="mean_norm"
        )
    assert values[0].tolist() == [0.7, 0.7]
    groups = [make_group("a", [0.7]), make_group("b", [1.0, 0.0])]
    section = AlgorithmSection.model_validate({"advantage": advantage})
    ours = turn_advantages(groups, section, 0.0)
    assert ours[TrajectoryId(group="a", member=0)].tolist() == [0.0]


def test_defect_17_with_std_divides_by_one() -> None:
    rewards, mask = _rows(0.7)
    values = official.grpo_advantage(rewards, mask, np.array(["a"]), normalize_std=True)
    assert values[0].tolist() == [0.7 / (1 + 1e-6)] * 2


def test_defect_18_every_turn_weighs_the_groups_mean() -> None:
    # a trajectory of three turns wins, one of a single turn loses
    rewards, mask = _rows(1.0, 1.0, 1.0, 0.0)
    uid, traj_uid = np.array(["g"] * 4), np.array(["long", "long", "long", "short"])
    by_turn = official.grpo_step_sample_advantage(
        rewards, mask, uid, traj_uid, cross=True, normalize_std=False
    )
    assert by_turn[:, 0].tolist() == [0.25, 0.25, 0.25, -0.75]
    episode = gigpo_episode_advantage(rewards, mask, uid, traj_uid, mode="mean_norm")
    assert episode.tolist() == by_turn.tolist()
    once = official.grpo_step_sample_advantage(
        rewards, mask, uid, traj_uid, cross=False, normalize_std=False
    )
    assert once[:, 0].tolist() == [0.5, 0.5, 0.5, -0.5]
    lengths, outcomes = (3, 1), (1.0, 0.0)
    members = tuple(
        ScoredTrajectory(
            trajectory=make_trajectory("g", i, [[make_turn()] * length]),
            reward=Reward(outcome=outcome),
        )
        for i, (length, outcome) in enumerate(zip(lengths, outcomes, strict=True))
    )
    group = ScoredGroup(group_id="g", prompt=make_prompt("g"), members=members)
    ours = turn_advantages([group], AlgorithmSection(), 0.0)
    assert np.concatenate(list(ours.values())).tolist() == once[:, 0].tolist()


def test_pass_at_k_pays_the_best_row_for_its_lead() -> None:
    (rewards, mask), uid = _rows(1.0, 3.0, 0.0), np.array(["a"] * 3)
    values = official.pass_at_k_advantage(rewards, mask, uid, normalize_std=False)
    assert values[:, 0].tolist() == [0.0, 2.0, 0.0]
    with pytest.raises(ValueError, match="group a has one row"):
        official.pass_at_k_advantage(rewards[:1], mask[:1], uid[:1], normalize_std=False)


def test_recalibration_keeps_positive_rows_and_by_ge_empty_ones_too() -> None:
    rewards, mask = _rows(1.0, 0.0, 1.0)
    mask[2] = 0.0
    result = official.recalibrated_advantage(
        rewards, mask, np.array([0.0, 0.5, 1.0]), np.array([2.0]), normalize_std=True
    )
    assert (result.mean, result.std) == (0.5, 2.0)
    assert result.advantages[:, 0] == pytest.approx([0.25, -0.25, 0.0], rel=1e-6)
    assert result.keep.tolist() == [True, False, False]
    assert result.keep_ge.tolist() == [True, False, True]


def test_numeric_anchors_are_equal_by_value_and_prompt() -> None:
    anchors, uid = np.array([[4, 0], [4, 1], [4, 0], [4, 0]]), np.array(["a", "a", "a", "b"])
    assert gigpo_step_labels(anchors, uid).tolist() == [0, 1, 0, 2]
    signed = np.array([[0.0, 1.0], [-0.0, 1.0], [np.nan, 1.0], [np.nan, 1.0]])
    assert gigpo_step_labels(signed, np.array(["a"] * 4)).tolist() == [0, 0, 1, 2]


def test_equal_float32_scores_miss_their_mean_and_the_std_shows_it() -> None:
    """0.9 + 0.9 + 0.9 rounds up, so the mean is 2^-24 too low; the std is as small.

    off / (off * sqrt(3 / 2) + 1e-6) = 0.0555, of scores and of step returns.
    """
    off = 2.0**-24
    seen = off / (off * 1.5**0.5 + 1e-6)
    scores = np.full(3, 0.9, np.float32)
    rewards = np.stack([np.zeros(3, np.float32), scores], 1)
    mask, uid = np.ones((3, 2)), np.array(["a"] * 3)
    grpo = official.grpo_advantage(rewards, mask, uid, normalize_std=True)
    assert grpo == pytest.approx(np.full((3, 2), seen), rel=1e-4)
    anchors = np.array(["x"] * 3)
    step = gigpo_step_advantage(scores, mask, anchors, uid, mode="mean_std_norm")
    assert step.tolist() == grpo.tolist()
    assert official.grpo_advantage(rewards, mask, uid, normalize_std=False) == pytest.approx(off)


def test_the_std_of_pass_at_k_is_taken_in_float32() -> None:
    scores = np.float32([[0.9], [0.9], [0.9 + 2.0**-24]])  # the last one is the next number
    best = official.pass_at_k_advantage(
        scores, np.ones((3, 1)), np.array(["a"] * 3), normalize_std=True
    )
    std = torch.from_numpy(scores).std().item()
    assert best.ravel().tolist() == [0.0, 0.0, pytest.approx(2.0**-24 / (std + 1e-6), rel=1e-6)]


def test_a_step_group_of_one_gives_zero() -> None:
    args = (
        np.array([0.7, 1.0, 0.0]),
        np.ones((3, 1)),
        np.array(["x", "y", "y"]),
        np.array(["a"] * 3),
    )
    assert gigpo_step_advantage(*args, mode="mean_norm").ravel().tolist() == [0.0, 0.5, -0.5]
    assert gigpo_step_advantage(*args, mode="mean_std_norm")[0, 0] == 0.0


def test_whitening_divides_by_the_tokens_and_a_rounding() -> None:
    # centred scores 0.5, -0.5 on tokens 3 and 1: mean 0.25, variance (3 * 0.0625 + 0.5625) / 3
    rewards, mask = np.array([[1.0, 0, 0], [0, 0, 0]]), np.array([[1, 1, 1], [1, 0, 0]])
    values = official.reinforce_pp_baseline_advantage(rewards, mask, np.array(["a", "a"]))
    assert values == pytest.approx(np.array([[0.5, 0.5, 0.5], [-1.5, 0, 0]]))
    none = official.reinforce_pp_baseline_advantage(rewards, mask * 0, np.array(["a", "a"]))
    assert not none.any()
