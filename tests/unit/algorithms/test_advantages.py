"""Group-relative advantages by hand, and that segments and turns do not count twice."""

import numpy as np
import pytest

from megatron_spear.algorithms.advantages import group_relative, turn_advantages
from megatron_spear.config.schema import AlgorithmSection
from megatron_spear.testing.hand_made import make_group, make_prompt, make_trajectory, make_turn
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory, TrajectoryId


def test_by_hand() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    values, scale = group_relative(rewards, normalize_std=False)
    assert values.tolist() == [0.5, -0.5, -0.5, 0.5] and scale == 1.0
    std = (4 * 0.25 / 3) ** 0.5
    expected = 0.5 / (std + 1e-6)
    assert group_relative(rewards, normalize_std=True)[0][0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("rewards", [[0.7], [0.1] * 10, []])
def test_nothing_to_compare_is_exactly_zero(rewards: list[float], normalize_std: bool) -> None:
    result, _ = group_relative(np.array(rewards), normalize_std=normalize_std)
    assert result.tolist() == [0.0] * len(rewards)


def test_a_trajectory_counts_once_whatever_its_segments() -> None:
    long = make_trajectory("g", 0, [[make_turn(), make_turn()], [make_turn()]])
    short = make_trajectory("g", 1)
    group = ScoredGroup(
        group_id="g",
        prompt=make_prompt("g"),
        members=(
            ScoredTrajectory(trajectory=long, reward=Reward(outcome=1.0)),
            ScoredTrajectory(trajectory=short, reward=Reward(outcome=0.0)),
        ),
    )
    result = turn_advantages([group], AlgorithmSection(), 0.0)
    assert result[long.id].tolist() == [0.5, 0.5, 0.5]
    assert result[short.id].tolist() == [-0.5]


def test_uses_the_current_intrinsic_weight_and_keeps_groups_apart() -> None:
    groups = [
        make_group("a", [Reward(outcome=0, intrinsic=1.0), Reward(outcome=0)]),
        make_group("b", [5.0, 5.0]),
    ]
    result = turn_advantages(groups, AlgorithmSection(), 0.5)
    assert result[TrajectoryId(group="a", member=0)].tolist() == [0.25]
    assert result[TrajectoryId(group="b", member=0)].tolist() == [0.0]
    silent = turn_advantages(groups, AlgorithmSection(), 0.0)
    assert silent[TrajectoryId(group="a", member=0)].tolist() == [0.0]


def _with_invalid_turns() -> tuple[ScoredGroup, TrajectoryId, TrajectoryId]:
    """Won with one invalid turn of two, lost with none: format -0.1 and 0 (penalty 0.2)."""
    won = make_trajectory("g", 0, [[make_turn(), make_turn(valid=False)]])
    lost = make_trajectory("g", 1, [[make_turn(), make_turn(), make_turn()]])
    members = (
        ScoredTrajectory(trajectory=won, reward=Reward(outcome=1.0, format=-0.1)),
        ScoredTrajectory(trajectory=lost, reward=Reward(outcome=0.0)),
    )
    return (
        ScoredGroup(group_id="g", prompt=make_prompt("g"), members=members),
        won.id,
        lost.id,
    )


def test_an_invalid_action_is_charged_to_its_turn() -> None:
    group, won, lost = _with_invalid_turns()
    result = turn_advantages([group], AlgorithmSection(), 0.0)
    assert result[won] == pytest.approx([0.55, 0.35])
    assert result[lost] == pytest.approx([-0.45] * 3)


def test_the_spread_inside_trajectories_counts_in_the_std() -> None:
    group, won, lost = _with_invalid_turns()
    result = turn_advantages([group], AlgorithmSection(normalize_std=True), 0.0)
    std = (0.9**2 / 2 + 0.1**2 / 2) ** 0.5  # between (unbiased) + mean of 0.1^2 and 0
    assert result[won] == pytest.approx([0.55 / std, 0.35 / std], rel=1e-5)
    assert result[lost] == pytest.approx([-0.45 / std] * 3, rel=1e-5)


def test_equal_failures_still_learn_what_is_invalid() -> None:
    turns = [[make_turn(valid=False), make_turn()]]
    members = tuple(
        ScoredTrajectory(
            trajectory=make_trajectory("g", i, turns), reward=Reward(outcome=0.0, format=-0.1)
        )
        for i in range(2)
    )
    group = ScoredGroup(group_id="g", prompt=make_prompt("g"), members=members)
    for normalize, expected in ((False, 0.1), (True, 1.0)):
        result = turn_advantages([group], AlgorithmSection(normalize_std=normalize), 0.0)
        assert result[members[0].trajectory.id] == pytest.approx([-expected, expected], rel=1e-4)
