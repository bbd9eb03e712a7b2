"""The baseline's history and the baselines made of it, by hand numbers; exact resume."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.errors import CheckpointError, DataError
from megatron_spear.replay.baseline import BaselineHistory, baseline_values, batch_mean
from megatron_spear.replay.index import ReplayIndex, key_of
from megatron_spear.testing.hand_made import make_group, make_prompt
from megatron_spear.types import Reward, ScoredGroup


def _index(*groups: str) -> ReplayIndex:
    """Rows of the prompts of these groups; a baseline reads nothing else of them."""
    count = len(groups)
    numbers = {name: np.zeros(count) for name in ("outcome", "intrinsic", "format", "advantages")}
    return ReplayIndex(
        row_ids=np.arange(count),
        policy_versions=np.zeros(count, np.int64),
        num_tokens=np.ones(count, np.int64),
        prompt_keys=np.array([key_of(make_prompt(g).prompt_id) for g in groups], np.uint64),
        trajectory_keys=np.arange(count).astype(np.uint64),
        **numbers,
    )


def _history(*groups: ScoredGroup, keep: int = 10) -> BaselineHistory:
    history = BaselineHistory(keep)
    history.extend(1, groups)
    return history


def _values(kind: str, index: ReplayIndex, history: BaselineHistory, **changes: Any) -> list[float]:
    given = {"step_mean": None, "intrinsic_weight": 0.0} | changes
    values, _ = baseline_values(kind, index, history, **given)
    return values.tolist()


def test_weighs_old_groups_with_the_current_intrinsic_weight() -> None:
    history = BaselineHistory(10)
    history.extend(1, [make_group("a", [1.0, 1.0])])
    history.extend(2, [make_group("b", [Reward(outcome=0, intrinsic=x) for x in (0.2, 0.6)])])
    history.extend(3, [make_group("c", [Reward(outcome=0, format=-0.2)])])
    assert history.p50(0.0) == 0.0
    assert history.p50(1.0) == pytest.approx(0.4)
    assert history.p50(5.0) == pytest.approx(1.0)


def test_even_count_interpolates() -> None:
    assert _history(make_group("a", [0.0]), make_group("b", [1.0])).p50(0.0) == 0.5


def test_a_history_of_one_is_its_own_median() -> None:
    history = _history(make_group("a", [0.25]))
    assert history.p50(0.0) == 0.25
    for kind in ("p50", "per_prompt"):
        assert _values(kind, _index("a", "b"), history) == [0.25, 0.25]


def test_oldest_groups_leave() -> None:
    history = BaselineHistory(2)
    history.extend(1, [make_group("a", [9.0]), make_group("b", [1.0])])
    history.extend(2, [make_group("c", [3.0])])
    assert len(history) == 2 and history.p50(0.0) == 2.0


def test_empty_groups_say_nothing() -> None:
    assert len(_history(make_group("a", []))) == 0


@pytest.mark.parametrize("value", [0.1, 1.05, 1e6 + 0.1, -1e6 / 3])
def test_equal_rewards_have_exactly_their_own_mean(value: float) -> None:
    """A plain sum would miss it, so that a reward beats a mean of its equals by a rounding."""
    counts = range(1, 60)
    assert any(sum([value] * n) / n != value for n in counts)
    for count in counts:
        group = make_group("a", [value] * count)
        assert batch_mean([group], 0.0) == value
        history = _history(group, *[make_group("b", [value])] * count, keep=100)
        assert _values("per_prompt", _index("a", "b"), history) == [value, value]


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=1, max_size=4), min_size=1, max_size=20),
    st.integers(1, 8),
    st.floats(0, 2),
)
def test_slow_reference(groups: list[list[float]], keep: int, weight: float) -> None:
    """Median and means by prompt (three prompts in turn) of the newest groups."""
    history = BaselineHistory(keep)
    for step, rewards in enumerate(groups):
        rewards_in_parts = [Reward(outcome=r, intrinsic=-r / 3, format=0.1) for r in rewards]
        history.extend(step, [make_group(str(step % 3), rewards_in_parts)])
    means = [np.mean([r - weight * r / 3 + 0.1 for r in rewards]) for rewards in groups]
    p50 = float(np.median(means[-keep:]))
    assert history.p50(weight) == pytest.approx(p50, abs=1e-9)
    by_prompt: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for step, mean in list(enumerate(means))[-keep:]:
        by_prompt[step % 3].append(float(mean))
    expected = [float(np.mean(by_prompt[i])) if by_prompt[i] else p50 for i in (2, 0, 1, 0)]
    found = _values("per_prompt", _index("2", "0", "1", "0"), history, intrinsic_weight=weight)
    assert found == pytest.approx(expected, abs=1e-9)


def test_p50_is_the_same_for_all_rows_and_nothing_more_is_told() -> None:
    history = _history(make_group("a", [1.0]), make_group("b", [0.0]))
    values, metrics = baseline_values(
        "p50", _index("a", "b"), history, step_mean=9.0, intrinsic_weight=0.0
    )
    assert values.tolist() == [0.5, 0.5] and metrics == {}


def test_per_prompt_compares_within_a_prompt_and_else_with_p50() -> None:
    """Means: a 1 and 0 (so 0.5), b 0.25; the median of 0, 0.25 and 1 is 0.25."""
    history = BaselineHistory(3)
    history.extend(1, [make_group("gone", [7.0])])
    history.extend(2, [make_group("a", [1.0]), make_group("b", [0.25])])
    history.extend(3, [make_group("a", [1.0, -1.0])])
    values, metrics = baseline_values(
        "per_prompt", _index("a", "b", "gone", "a"), history, step_mean=9.0, intrinsic_weight=0.0
    )
    assert values.tolist() == [0.5, 0.25, 0.25, 0.5]
    assert metrics == {"replay/baseline_mean": 0.375, "replay/num_compared_with_p50": 1.0}


def test_per_prompt_weighs_with_the_current_intrinsic_weight() -> None:
    history = _history(make_group("a", [Reward(outcome=0.0, intrinsic=x) for x in (0.2, 0.6)]))
    for weight, expected in ((0.0, 0.0), (0.5, 0.2), (1.0, 0.4)):
        found = _values("per_prompt", _index("a"), history, intrinsic_weight=weight)
        assert found == [pytest.approx(expected)]


def test_batch_mean_counts_every_trajectory_of_the_step_once() -> None:
    groups = [make_group("a", [1.0, 1.0, 1.0]), make_group("b", [0.0]), make_group("c", [])]
    assert batch_mean(groups, 0.0) == 0.75
    history = _history(make_group("old", [0.0]), *groups)
    values, metrics = baseline_values(
        "batch_mean", _index("a", "old"), history, step_mean=0.75, intrinsic_weight=0.0
    )
    assert values.tolist() == [0.75, 0.75]
    assert metrics == {"replay/baseline_mean": 0.75, "replay/num_compared_with_p50": 0.0}
    shaped = make_group("d", [Reward(outcome=0.0, intrinsic=0.4, format=-0.1)])
    assert batch_mean([shaped], 0.5) == pytest.approx(0.1)


def test_a_step_without_trajectories_leaves_batch_mean_to_p50() -> None:
    assert batch_mean([make_group("a", [])], 0.0) is None
    history = _history(make_group("a", [1.0]), make_group("b", [0.5]))
    values, metrics = baseline_values(
        "batch_mean", _index("a", "b"), history, step_mean=None, intrinsic_weight=0.0
    )
    assert values.tolist() == [0.75, 0.75]
    assert metrics["replay/num_compared_with_p50"] == 2.0


@pytest.mark.parametrize("kind", ["p50", "batch_mean", "per_prompt"])
def test_without_rows_there_is_nothing_to_compare(kind: str) -> None:
    assert _values(kind, _index(), BaselineHistory(8)) == []


@pytest.mark.parametrize("kind", ["p50", "batch_mean", "per_prompt"])
def test_large_rewards_are_compared_exactly(kind: str) -> None:
    history = _history(make_group("a", [1e6, -1e6]), make_group("b", [1e6]))
    found = _values(kind, _index("a", "b"), history, step_mean=1e6 / 3)
    expected = {"p50": [5e5, 5e5], "batch_mean": [1e6 / 3] * 2, "per_prompt": [0.0, 1e6]}
    assert found == expected[kind]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(value: float) -> None:
    history = _history(make_group("a", [1.0]))
    bad = [make_group("b", [1.0]), make_group("c", [0.0, Reward(outcome=0.0, intrinsic=value)])]
    with pytest.raises(DataError, match=r"group c of prompt prompt-c: .*expected finite numbers"):
        history.extend(2, bad)
    assert len(history) == 1, "nothing of that step was recorded"


def test_resume() -> None:
    history = BaselineHistory(5)
    history.extend(1, [make_group(str(i), [Reward(outcome=i, intrinsic=0.1)]) for i in range(7)])
    resumed = BaselineHistory(5)
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert resumed.state_dict() == history.state_dict()
    assert resumed.p50(0.3) == history.p50(0.3)
    index = _index(*map(str, range(7)))
    expected = _values("per_prompt", index, history, intrinsic_weight=0.3)
    assert _values("per_prompt", index, resumed, intrinsic_weight=0.3) == expected
    assert len(set(expected)) == 5, "each prompt by its own mean, two by their median"
    empty = BaselineHistory(5)
    resumed.load_state_dict(empty.state_dict())
    assert len(resumed) == 0
    state = empty.state_dict()
    del state["format"]
    with pytest.raises(CheckpointError, match=r"missing \['format'\]"):
        resumed.load_state_dict(state)
