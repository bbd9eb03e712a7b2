"""Reward parts by hand; errors are never scored."""

import pytest

from megatron_spear.config.method import RewardSection
from megatron_spear.rewards.compose import score, trajectory_reward
from megatron_spear.rewards.summary import reward_metrics
from megatron_spear.testing.hand_made import make_group, make_prompt, make_trajectory, make_turn
from megatron_spear.types import Reward, Status, TrajectoryGroup


def test_distinct_valid_actions_are_paid_once() -> None:
    actions = ["go to desk 1", "look", "look", "look ", "take pen 1"]
    trajectory = make_trajectory("g", 0, [[make_turn(a) for a in actions]], won=True)
    reward = trajectory_reward(trajectory, RewardSection())
    assert (reward.outcome, reward.intrinsic, reward.format) == pytest.approx((1.0, 0.03, 0.0))
    assert reward.parts["num_turns"] == reward.parts["num_calls"] == 5


def test_distinct_across_segments_and_capped() -> None:
    segments = [[make_turn(f"go to desk {i}") for i in range(8)]] * 2
    reward = trajectory_reward(
        make_trajectory("g", 0, segments),
        RewardSection(intrinsic={"type": "distinct_calls", "per_call": 0.01, "max": 0.05}),
    )
    assert (reward.outcome, reward.intrinsic) == (0.0, 0.05)
    assert reward.parts["num_calls"] == 16


def test_invalid_turns_cost_format_and_earn_nothing() -> None:
    turns = [make_turn("xyz", valid=False), make_turn("abc", valid=False), make_turn("look")]
    reward = trajectory_reward(
        make_trajectory("g", 0, [turns], won=True),
        RewardSection(success=10.0, invalid_action_penalty=0.1),
    )
    assert (reward.outcome, reward.intrinsic, reward.format) == pytest.approx(
        (10.0, 0.01, -0.2 / 3)
    )
    assert reward.total(0.5) == pytest.approx(10.0 + 0.005 - 0.2 / 3)


def test_a_lost_attempt_may_cost() -> None:
    section = RewardSection(failure=-1.0, intrinsic={"type": "official_qwen3"})
    turns = [[make_turn("look"), make_turn("go to desk 1")]]
    lost, won = (
        trajectory_reward(make_trajectory("g", i, turns, won=bool(i)), section) for i in range(2)
    )
    assert (lost.outcome, lost.intrinsic, lost.total(0.5)) == pytest.approx((-1.0, 0.2, -0.9))
    assert (won.outcome, won.intrinsic, won.total(0.5)) == pytest.approx((1.0, 1.0, 1.5))


@pytest.mark.parametrize("status", [status for status in Status if status.failed])
def test_failures_are_not_scored(status: Status) -> None:
    good = make_trajectory("g", 0, status=Status.TRUNCATED_TURNS)
    bad = make_trajectory("g", 1, won=True, status=status)
    group = TrajectoryGroup(
        group_id="g", prompt=make_prompt("g"), members=(good, bad), failures=(bad,)
    )
    scored = score(group, RewardSection())
    assert [member.trajectory.id.member for member in scored.members] == [0]


def test_summary_counts_each_trajectory_once() -> None:
    group = make_group("g", [Reward(outcome=1, intrinsic=0.1), Reward(outcome=0, intrinsic=0.1)])
    metrics = reward_metrics([group, make_group("empty", [])], 0.5)
    assert metrics["reward/mean"] == pytest.approx(0.55)
    assert metrics["reward/outcome"] == 0.5 and metrics["reward/intrinsic"] == 0.1
    assert metrics["reward/format"] == 0.0
    assert reward_metrics([], 0.5) == {}
