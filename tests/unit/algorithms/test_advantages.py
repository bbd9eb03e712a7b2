"""Group-relative advantages by hand, and that segments and turns do not count twice."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_spear.algorithms.advantages import turn_advantages, turn_returns
from megatron_spear.algorithms.group_baselines import group_relative
from megatron_spear.config.method import AlgorithmSection, GigpoSection
from megatron_spear.errors import ConfigError
from megatron_spear.testing.hand_made import make_group, make_prompt, make_trajectory, make_turn
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory, TrajectoryId, Turn


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


METHODS = ("grpo", "rloo", "reinforce_pp_baseline", "gigpo")


def _at(anchor: str, *, valid: bool = True, num_tokens: int = 2) -> Turn:
    return replace(make_turn(valid=valid, num_tokens=num_tokens), anchor=anchor)


def _group(name: str, *members: tuple[Sequence[Turn], Reward]) -> ScoredGroup:
    """Trajectories of one segment with these turns and rewards."""
    scored = tuple(
        ScoredTrajectory(trajectory=make_trajectory(name, i, [turns]), reward=reward)
        for i, (turns, reward) in enumerate(members)
    )
    return ScoredGroup(group_id=name, prompt=make_prompt(name), members=scored)


def _values(
    groups: Sequence[ScoredGroup], method: str, **settings: object
) -> dict[str, list[float]]:
    section = AlgorithmSection.model_validate({"advantage": method, **settings})
    return {str(id_): v.tolist() for id_, v in turn_advantages(groups, section, 0.0).items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_each_turn_a_float64(method: str) -> None:
    turns = [_at("a"), _at("b")]
    group = _group("g", (turns, Reward(outcome=1.0)), (turns[:1], Reward(outcome=0.0)))
    section = AlgorithmSection.model_validate({"advantage": method})
    result = turn_advantages([group], section, 0.0)
    assert [v.shape for v in result.values()] == [(2,), (1,)]
    assert all(v.dtype == np.float64 for v in result.values())
    assert turn_advantages([], section, 0.0) == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_one_alone_is_exactly_zero(method: str) -> None:
    groups = [_group("g", ([_at("a"), _at("b")], Reward(outcome=3.0)))]
    assert _values(groups, method) == {"g/0": [0.0, 0.0]}


def test_rloo_compares_with_the_others_and_charges_invalid_turns() -> None:
    group = make_group("g", [1.0, 0.0, 0.0])
    assert _values([group], "rloo") == {"g/0": [1.0], "g/1": [-0.5], "g/2": [-0.5]}
    group, won, lost = _with_invalid_turns()  # totals 0.9 and 0
    result = _values([group], "rloo")
    assert result[str(won)] == pytest.approx([1.0, 0.8])
    assert result[str(lost)] == pytest.approx([-0.9] * 3)


def test_reinforce_pp_baseline_whitens_over_tokens_of_all_groups() -> None:
    groups = [
        _group(
            "a",
            ([_at("s", num_tokens=2), _at("s", num_tokens=1)], Reward(outcome=1.0)),
            ([_at("s", num_tokens=1)], Reward(outcome=0.0)),
        ),
        _group("b", ([_at("s", num_tokens=4)], Reward(outcome=5.0))),
    ]
    # tokens: 0.5 three times, -0.5 once, 0 four times; mean 1/8, squares add up to 1
    std = ((1.0 - 8 / 64) / 7) ** 0.5
    result = _values(groups, "reinforce_pp_baseline")
    assert result["a/0"] == pytest.approx([0.375 / std] * 2, rel=1e-6)
    assert result["a/1"] == pytest.approx([-0.625 / std], rel=1e-6)
    assert result["b/0"] == pytest.approx([-0.125 / std], rel=1e-6)


def test_turn_returns_by_hand() -> None:
    turns = [_at("a"), _at("b", valid=False), _at("c")]
    reward = Reward(outcome=1.0, intrinsic=9.0, format=-0.1)  # one of three at 0.3
    (member,) = _group("g", (turns, reward)).members
    assert turn_returns(member, 0.5) == pytest.approx([0.25, 0.5 - 0.3, 1.0])


def _crossing() -> ScoredGroup:
    """Both start at the desk; the first wins in two turns, the second gives up after one."""
    return _group(
        "g",
        ([_at("desk"), _at("shelf")], Reward(outcome=1.0)),
        ([_at("desk")], Reward(outcome=0.0)),
    )


def test_gigpo_by_hand() -> None:
    half = {"discount": 0.5, "step_weight": 0.5}
    # returns 0.5 (desk), 1 (shelf, alone), 0 (desk): step part 0.25, 0, -0.25
    assert _values([_crossing()], "gigpo", gigpo=half) == {"g/0": [0.625, 0.5], "g/1": [-0.625]}
    result = _values([_crossing()], "gigpo", gigpo=half | {"mode": "mean_std_norm"})
    episode, step = 0.5 / (0.5**0.5 + 1e-6), 0.25 / (0.125**0.5 + 1e-6)
    assert result["g/0"] == pytest.approx([episode + 0.5 * step, episode], rel=1e-12)
    assert result["g/1"] == pytest.approx([-episode - 0.5 * step], rel=1e-12)


def test_gigpo_defaults_are_the_papers_weight_and_discount() -> None:
    assert GigpoSection().model_dump() == {
        "step_weight": 1.0,
        "mode": "mean_norm",
        "discount": 0.95,
    }
    assert _values([_crossing()], "gigpo")["g/0"] == pytest.approx([0.5 + 0.475, 0.5])


def test_gigpo_without_its_step_part_is_grpo() -> None:
    group, _, _ = _with_invalid_turns()
    for mode, normalize_std in (("mean_norm", False), ("mean_std_norm", True)):
        got = _values([group], "gigpo", gigpo={"step_weight": 0.0, "mode": mode})
        assert got == _values([group], "grpo", normalize_std=normalize_std)


def test_gigpo_compares_within_a_prompts_group_only() -> None:
    groups = [
        _group("a", ([_at("desk")], Reward(outcome=1.0))),
        _group("b", ([_at("desk")], Reward(outcome=0.0))),
    ]
    assert _values(groups, "gigpo") == {"a/0": [0.0], "b/0": [0.0]}


def test_gigpo_charges_an_invalid_turn_to_itself_alone() -> None:
    turns = [_at("a"), _at("b", valid=False)]
    group = _group(
        "g",
        (turns, Reward(outcome=0.0, format=-0.1)),
        ([_at("a"), _at("b")], Reward(outcome=0.0)),
    )
    result = _values([group], "gigpo", gigpo={"discount": 0.5})
    # episode -0.05 with deviations +0.1, -0.1; step: returns (0, -0.2) against (0, 0)
    assert result["g/0"] == pytest.approx([0.05, -0.15 - 0.1])
    assert result["g/1"] == pytest.approx([0.05, 0.05 + 0.1])


def test_gigpo_takes_a_turn_without_anchor_as_seen_once() -> None:
    group = _group(
        "g",
        ([_at(""), _at("x")], Reward(outcome=1.0)),
        ([_at("")], Reward(outcome=0.0)),
    )
    assert _values([group], "gigpo") == {"g/0": [0.5, 0.5], "g/1": [-0.5]}
    nameless = _group("g", ([_at("")], Reward(outcome=1.0)))
    with pytest.raises(ConfigError, match="no turn of this step has one"):
        _values([nameless], "gigpo")


def test_a_trajectory_that_occurs_twice_is_refused() -> None:
    group = make_group("g", [1.0])
    with pytest.raises(AssertionError, match="g/0"):
        _values([group, group], "grpo")
