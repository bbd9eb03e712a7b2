"""What holds for the advantages of any step, by every method: extreme and equal rewards, groups of
one, empty groups, any order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.errors import DataError
from megatron_spear.testing.hand_made import make_prompt, make_trajectory, make_turn
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory, TrajectoryId

METHODS: list[dict[str, Any]] = [
    {"advantage": "grpo"},
    {"advantage": "grpo", "normalize_std": True},
    {"advantage": "rloo"},
    {"advantage": "reinforce_pp_baseline"},
    {"advantage": "gigpo"},
    {"advantage": "gigpo", "gigpo": {"mode": "mean_std_norm"}},
]
EACH_METHOD = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: "-".join(map(str, m.values()))
)
_Member = tuple[float, list[bool]]
_REWARD = st.sampled_from([0.0, 1.0, 0.1, 0.5, 1e6, -1e6])
_MEMBER = st.tuples(_REWARD, st.lists(st.booleans(), min_size=1, max_size=3))
_GROUPS = st.lists(st.lists(_MEMBER, max_size=4), max_size=4)


def _group(name: str, members: list[_Member], *, penalty: float = 0.2) -> ScoredGroup:
    """Members of (outcome, valid turns); format is the mean penalty of the invalid ones."""
    scored = []
    for number, (outcome, valid) in enumerate(members):
        turns = [make_turn(f"act {at}", valid=ok) for at, ok in enumerate(valid)]
        reward = Reward(outcome=outcome, format=-penalty * valid.count(False) / len(valid))
        trajectory = make_trajectory(name, number, [[turn] for turn in turns])
        scored.append(ScoredTrajectory(trajectory=trajectory, reward=reward))
    return ScoredGroup(group_id=name, prompt=make_prompt(name), members=tuple(scored))


def _advantages(
    groups: list[ScoredGroup], method: dict[str, Any]
) -> dict[TrajectoryId, np.ndarray]:
    return dict(turn_advantages(groups, AlgorithmSection(**method), 0.5))


@EACH_METHOD
@settings(max_examples=40, deadline=None)
@given(drawn=_GROUPS)
def test_one_finite_number_a_turn_whatever_the_order(
    method: dict[str, Any], drawn: list[list[_Member]]
) -> None:
    groups = [_group(str(i), members) for i, members in enumerate(drawn)]
    found = _advantages(groups, method)
    assert set(found) == {m.trajectory.id for group in groups for m in group.members}
    for group in groups:
        for member in group.members:
            values = found[member.trajectory.id]
            assert values.dtype == np.float64 and len(values) == len(member.trajectory.turns)
            assert np.isfinite(values).all()
    again = _advantages(groups[::-1], method)
    for name, values in found.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-9, atol=1e-6)


@EACH_METHOD
@settings(max_examples=25, deadline=None)
@given(reward=_REWARD, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_equal_rewards_teach_nothing(
    method: dict[str, Any], reward: float, sizes: list[int]
) -> None:
    """Exactly 0, in groups of one too; with GiGPO the turns must lead to the same as well."""
    groups = [_group(str(i), [(reward, [True])] * size) for i, size in enumerate(sizes)]
    assert not any(values.any() for values in _advantages(groups, method).values())


@EACH_METHOD
@settings(max_examples=25, deadline=None)
@given(rewards=st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=5), shift=st.floats(-3.0, 3.0))
def test_what_all_members_get_does_not_count(
    method: dict[str, Any], rewards: list[float], shift: float
) -> None:
    """A group compares its members only; their advantages add up to 0 (one turn each)."""
    one, other = (
        _advantages([_group("g", [(value + by, [True]) for value in rewards])], method)
        for by in (0.0, shift)
    )
    scale = max(1.0, max(float(abs(values).max()) for values in one.values()))
    if np.ptp(rewards) > 1e-3:  # below that a division by the std enlarges the sum's rounding
        for name, values in one.items():
            np.testing.assert_allclose(other[name], values, atol=1e-6 * scale)
    assert sum(values.sum() for values in one.values()) == pytest.approx(0.0, abs=1e-6 * scale)


@EACH_METHOD
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_refused(method: dict[str, Any], value: float) -> None:
    with pytest.raises(DataError, match="g/1"):
        _advantages([_group("g", [(1.0, [True]), (value, [True])])], method)
