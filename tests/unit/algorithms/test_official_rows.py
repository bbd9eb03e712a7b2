"""The official code's rows from scored groups: scores, filters and advantages by hand."""

from typing import Any

import numpy as np
import pytest

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.official.rows import official_rows
from megatron_spear.config.method import AlgorithmSection, RewardSection
from megatron_spear.rewards.compose import trajectory_reward
from megatron_spear.rewards.official_shaping import official_turn_rewards
from megatron_spear.testing.hand_made import make_group, make_prompt, make_trajectory, make_turn
from megatron_spear.types import (
    Coefficients,
    Reward,
    RowKey,
    ScoredGroup,
    ScoredTrajectory,
    StepContext,
    TrainSample,
)

CTX = StepContext(
    step=3,
    policy_version=2,
    coefficients=Coefficients(intrinsic_weight=0.5, replay_weight=1.0),
    seed=7,
)

NONE: frozenset[RowKey] = frozenset()
"""No row is marked by a filter."""


def _section(tree: str = "agent", **changes: Any) -> AlgorithmSection:
    values: dict[str, Any] = {"keep_groups_fraction": 1.0, "official": {"tree": tree}}
    return AlgorithmSection(**({"compat": "official"} | values | changes))


def _windowed(name: str, members: list[tuple[int, Reward, int | None]]) -> ScoredGroup:
    """A group of (turns, reward, index of the invalid turn); each turn is a segment."""
    scored = []
    for member, (count, reward, invalid) in enumerate(members):
        turns = [make_turn(f"act {i}", valid=i != invalid) for i in range(count)]
        trajectory = make_trajectory(name, member, [[turn] for turn in turns])
        scored.append(ScoredTrajectory(trajectory=trajectory, reward=reward))
    return ScoredGroup(group_id=name, prompt=make_prompt(name), members=tuple(scored))


def _numbers(samples: list[TrainSample]) -> dict[tuple[str, int], float]:
    """Each row's advantage, which all its trained tokens share."""
    found = {}
    for sample in samples:
        (value,) = set(sample.advantages[sample.response_mask].tolist())
        assert not sample.advantages[~sample.response_mask].any()
        found[str(sample.trajectory_id), sample.segment] = value
    return found


def test_agent_rows_are_turns_and_each_moves_the_mean() -> None:
    """Defect 18: one win of one turn beside a loss of three has the mean 1/4, not 1/2."""
    group = _windowed("g", [(1, Reward(outcome=1.0), None), (3, Reward(outcome=0.0), None)])
    rows, metrics = official_rows(CTX, [group], NONE, _section(), 2)
    assert _numbers(rows) == {("g/0", 0): 0.75, **{("g/1", i): -0.25 for i in range(3)}}
    assert metrics["filter/num_groups"] == 1 and metrics["filter/num_incomplete_groups"] == 0
    corrected = turn_advantages([group], AlgorithmSection(), 0.5)
    assert {values[0] for values in corrected.values()} == {0.5, -0.5}


@pytest.mark.parametrize("advantage", ["grpo", "gigpo"])
def test_agent_rows_can_count_each_trajectory_once(advantage: str) -> None:
    """The mean is then 1/2; GiGPO's step part is the same for both settings."""
    group = _windowed("g", [(1, Reward(outcome=1.0), None), (3, Reward(outcome=0.0), None)])
    counted = [
        _numbers(
            official_rows(
                CTX,
                [group],
                NONE,
                _section(advantage=advantage, official={"every_turn_counts": every}),
                2,
            )[0]
        )
        for every in (True, False)
    ]
    differences = [counted[0][row] - counted[1][row] for row in counted[0]]
    assert differences == pytest.approx([0.5 - 0.25] * 4)


def test_a_row_is_charged_its_own_invalid_action_in_full() -> None:
    """Penalty 0.4 on one of two turns: format is -0.2 of the trajectory, -0.4 of the row."""
    reward = Reward(outcome=1.0, intrinsic=0.2, format=-0.2)
    group = _windowed("g", [(2, reward, 1), (2, Reward(outcome=0.0), None)])
    rows, _ = official_rows(CTX, [group], NONE, _section(), 2)
    scores = {(str(r.trajectory_id), r.segment): r.reward.total(0.5) for r in rows}
    assert scores == pytest.approx(
        {("g/0", 0): 1.1, ("g/0", 1): 0.7, ("g/1", 0): 0.0, ("g/1", 1): 0.0}
    )
    mean = 1.8 / 4
    assert _numbers(rows) == pytest.approx({k: v - mean for k, v in scores.items()}, rel=1e-6)


def test_the_agent_tree_wastes_what_a_power_of_two_leaves() -> None:
    """Defect 10's cut, of fresh rows: 7 rows become 4, the same ones for a step."""
    group = _windowed("g", [(3, Reward(outcome=1.0), None), (4, Reward(outcome=0.0), None)])
    rows, _ = official_rows(CTX, [group], NONE, _section(), 2)
    again, _ = official_rows(CTX, [group], NONE, _section(), 2)
    assert len(rows) == 4 and list(_numbers(rows)) == list(_numbers(again))
    others = {
        tuple(_numbers(official_rows(ctx, [group], NONE, _section(), 2)[0]))
        for ctx in (
            StepContext(step=s, policy_version=0, coefficients=CTX.coefficients, seed=7)
            for s in range(20)
        )
    }
    assert len(others) > 5


def test_math_rows_are_trajectories_in_blocks() -> None:
    """The block with the lower spread goes; a group with a failed member would shift the blocks."""
    groups = [
        make_group("a", [1.0, 0.0]),
        make_group("b", [0.5, 0.5]),
        make_group("c", [1.0]),
        make_group("d", [0.0, 3.0]),
    ]
    rows, metrics = official_rows(CTX, groups, NONE, _section("math", keep_groups_fraction=0.67), 2)
    assert _numbers(rows) == {("a/0", 0): 0.5, ("a/1", 0): -0.5, ("d/0", 0): -1.5, ("d/1", 0): 1.5}
    assert metrics["filter/num_groups"] == 4 and metrics["filter/num_incomplete_groups"] == 1


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("grpo", [0.5, -0.5, -0.5, 0.5]),
        ("rloo", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ("reinforce_pp_baseline", [0.866, -0.866, -0.866, 0.866]),
    ],
)
def test_math_advantages(advantage: str, expected: list[float]) -> None:
    """Two tokens a row: whitening divides by the std of eight tokens, sqrt(2/7)."""
    if advantage == "reinforce_pp_baseline":
        expected = [value / 0.866 * 0.5 / (2 / 7) ** 0.5 for value in expected]
    section = _section("math", advantage=advantage)
    rows, _ = official_rows(CTX, [make_group("g", [1.0, 0.0, 0.0, 1.0])], NONE, section, 4)
    assert list(_numbers(rows).values()) == pytest.approx(expected, rel=1e-4)


def test_gigpo_adds_the_turn_in_its_step_group() -> None:
    """Both trajectories begin alike; returns 0.5 and 0 there; the second turn of the first is
    seen once."""
    first = _windowed("g", [(2, Reward(outcome=1.0), None), (2, Reward(outcome=0.0), None)])
    section = _section(advantage="gigpo", gigpo={"discount": 0.5})
    rows, _ = official_rows(CTX, [first], NONE, section, 2)
    # episode part +-0.5; "act 0": returns 0.5, 0 -> +-0.25; "act 1": returns 1, 0 -> +-0.5
    assert _numbers(rows) == pytest.approx(
        {("g/0", 0): 0.75, ("g/0", 1): 1.0, ("g/1", 0): -0.75, ("g/1", 1): -1.0}
    )


@pytest.mark.parametrize("tree", ["agent", "math"])
def test_nothing_to_train_on(tree: str) -> None:
    assert official_rows(CTX, [], NONE, _section(tree), 2)[0] == []
    empty = ScoredGroup(group_id="g", prompt=make_prompt("g"), members=())
    rows, metrics = official_rows(CTX, [empty], NONE, _section(tree), 2)
    assert rows == [] and metrics["filter/num_incomplete_groups"] == 1


def test_a_group_of_one_keeps_its_reward() -> None:
    """Defect 17, to the end of the stage; the corrected advantage is 0."""
    group = make_group("g", [3.0])
    rows, _ = official_rows(CTX, [group], NONE, _section("math"), 1)
    assert _numbers(rows) == {("g/0", 0): 3.0}
    (values,) = turn_advantages([group], AlgorithmSection(), 0.5).values()
    assert not np.any(values)


def test_surviving_is_paid_on_every_row() -> None:
    """``official_steps``: outcome + mu * min(1, 0.1 * turns), as the released shaping has it."""
    section = RewardSection(success=10.0, intrinsic={"type": "official_steps"})
    played = [
        make_trajectory("g", member, [[make_turn(f"act {i}")] for i in range(turns)], won=won)
        for member, (turns, won) in enumerate([(12, True), (3, False), (1, True)])
    ]
    members = tuple(
        ScoredTrajectory(trajectory=t, reward=trajectory_reward(t, section)) for t in played
    )
    group = ScoredGroup(group_id="g", prompt=make_prompt("g"), members=members)
    rows, _ = official_rows(CTX, [group], NONE, _section(), 3)
    found = [row.reward.total(0.5) for row in rows]
    member = [row.trajectory_id.member for row in rows]
    assert len(rows) == 16
    assert found == pytest.approx([[10.5, 0.15, 10.05][m] for m in member])
    shaped = official_turn_rewards([10.0, 0.0, 10.0], [12, 3, 1], 0.5)
    assert found == pytest.approx(shaped[member].tolist(), rel=1e-6)
    expected = np.array(found) - np.mean(found)
    assert list(_numbers(rows).values()) == pytest.approx(expected.tolist(), rel=1e-5)
