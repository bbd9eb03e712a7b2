"""The baseline's history: parts weighed anew, oldest out first, exact resume."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.errors import CheckpointError
from megatron_spear.replay.baseline import BaselineHistory
from megatron_spear.testing.hand_made import make_group
from megatron_spear.types import Reward


def test_weighs_old_groups_with_the_current_intrinsic_weight() -> None:
    history = BaselineHistory(10)
    history.extend(1, [make_group("a", [1.0, 1.0])])
    history.extend(2, [make_group("b", [Reward(outcome=0, intrinsic=x) for x in (0.2, 0.6)])])
    history.extend(3, [make_group("c", [Reward(outcome=0, format=-0.2)])])
    assert history.p50(0.0) == 0.0
    assert history.p50(1.0) == pytest.approx(0.4)
    assert history.p50(5.0) == pytest.approx(1.0)


def test_even_count_interpolates() -> None:
    history = BaselineHistory(10)
    history.extend(1, [make_group("a", [0.0]), make_group("b", [1.0])])
    assert history.p50(0.0) == 0.5


def test_oldest_groups_leave() -> None:
    history = BaselineHistory(2)
    history.extend(1, [make_group("a", [9.0]), make_group("b", [1.0])])
    history.extend(2, [make_group("c", [3.0])])
    assert len(history) == 2 and history.p50(0.0) == 2.0


def test_empty_groups_say_nothing() -> None:
    history = BaselineHistory(4)
    history.extend(1, [make_group("a", [])])
    assert len(history) == 0


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=4), min_size=1, max_size=20),
    st.integers(1, 8),
    st.floats(0, 2),
)
def test_slow_reference(groups: list[list[float]], keep: int, weight: float) -> None:
    history = BaselineHistory(keep)
    for step, rewards in enumerate(groups):
        rewards_in_parts = [Reward(outcome=r, intrinsic=-r / 3, format=0.1) for r in rewards]
        history.extend(step, [make_group(str(step), rewards_in_parts)])
    means = [np.mean([r - weight * r / 3 + 0.1 for r in rewards]) for rewards in groups]
    assert history.p50(weight) == pytest.approx(float(np.median(means[-keep:])), abs=1e-9)


def test_resume() -> None:
    history = BaselineHistory(5)
    history.extend(1, [make_group(str(i), [Reward(outcome=i, intrinsic=0.1)]) for i in range(7)])
    resumed = BaselineHistory(5)
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert resumed.state_dict() == history.state_dict()
    assert resumed.p50(0.3) == history.p50(0.3)
    with pytest.raises(CheckpointError, match=r"missing \['format'\]"):
        resumed.load_state_dict({"step": [], "prompt_id": [], "outcome": [], "intrinsic": []})
