"""Which groups stay: by spread, by fraction, and independent of the order of arrival."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.algorithms.filters import counted_groups, keep_groups, reward_spread
from megatron_spear.errors import DataError
from megatron_spear.testing.hand_made import make_group, make_trajectory, make_turn
from megatron_spear.types import Reward, ScoredGroup, ScoredTrajectory


def _ids(groups: tuple[ScoredGroup, ...]) -> list[str]:
    return [group.group_id for group in groups]


def test_highest_spread_stays_in_order() -> None:
    groups = [
        make_group("a", [0.0, 1.0]),
        make_group("b", [1.0, 1.0]),
        make_group("c", [1.0, 0.0]),
        make_group("d", [0.2, 0.4]),
    ]
    kept, metrics = keep_groups(groups, 0.75, 0.0)
    assert _ids(kept) == ["a", "c", "d"]
    assert metrics["filter/num_groups"] == 4 and metrics["filter/num_kept_groups"] == 3
    assert metrics["filter/zero_spread_fraction"] == 0.25
    spread = 0.5**0.5
    assert metrics["filter/spread_mean"] == pytest.approx((2 * spread + 0.1 * 2**0.5) / 4)


def test_ties_are_drawn_alike_in_any_order() -> None:
    rewards = [0.7, 1.0, 0.9, 0.8, 0.1, 0.6]
    groups = [make_group(name, rewards) for name in "abcd"]
    # the same rewards in another order: numpy's std is larger in the last digit
    groups[2] = make_group("c", [1.0, 0.6, 0.7, 0.9, 0.1, 0.8])
    chosen = set()
    for seed in range(10):
        random.Random(seed).shuffle(groups)
        kept, _ = keep_groups(groups, 0.5, 0.0)
        chosen.add("".join(sorted(_ids(kept))))
    assert len(chosen) == 1 and len(*chosen) == 2


def test_ties_starve_no_kind_of_task() -> None:
    """Ids begin with seed and step, then the kind of task: the first in the alphabet is kept as
    often as the last, and the draw differs from step to step."""
    kept: Counter[str] = Counter()
    places = set()
    for step in range(200):
        names = [f"0.{step}/{kind}-{i}" for kind in ("heat", "look", "pick") for i in range(4)]
        chosen, _ = keep_groups([make_group(name, [0.0, 1.0]) for name in names], 0.75, 0.0)
        kept.update(name.split("/")[1].split("-")[0] for name in _ids(chosen))
        places.add(tuple(name in _ids(chosen) for name in names))
    assert kept.total() == 200 * 9 and len(places) > 100
    assert all(550 < count < 650 for count in kept.values()), kept


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 1), (0.29, 29), (0.999, 99), (1.0, 100)])
def test_fraction_floors_but_keeps_one(fraction: float, count: int) -> None:
    groups = [make_group(f"{i:03d}", [0.0, float(i)]) for i in range(100)]
    assert len(keep_groups(groups, fraction, 0.0)[0]) == count


def test_empty_groups_never_count() -> None:
    kept, metrics = keep_groups([make_group("a", []), make_group("b", [1.0])], 1.0, 0.0)
    assert _ids(kept) == ["b"]
    assert metrics["filter/num_empty_groups"] == 1
    assert keep_groups([], 0.75, 0.0)[0] == ()


_REWARDS = st.lists(st.sampled_from([0.0, 1.0, 0.1, 1e6 + 0.1, -1e6, 1e6]), max_size=5)


@settings(max_examples=100, deadline=None)
@given(st.lists(_REWARDS, max_size=6), st.floats(0.01, 1.0), st.randoms(use_true_random=False))
def test_any_groups(rewards: list[list[float]], fraction: float, order: random.Random) -> None:
    """Whatever order groups and members come in, the same are kept, and none spreads less than one
    that was left out; equal rewards and groups of one have no spread."""
    groups = [make_group(f"{i}", row) for i, row in enumerate(rewards)]
    kept, metrics = keep_groups(groups, fraction, 0.0)
    names = {group.group_id for group in kept}
    left = [group for group in groups if group.members and group.group_id not in names]
    lowest = min((reward_spread(group, 0.0) for group in kept), default=0.0)
    assert all(reward_spread(group, 0.0) <= lowest for group in left)
    assert len(kept) == metrics["filter/num_kept_groups"] >= bool(any(rewards))
    for group, row in zip(groups, rewards, strict=True):
        assert (reward_spread(group, 0.0) == 0.0) is (len(set(row)) < 2)
    shuffled = [make_group(f"{i}", order.sample(row, len(row))) for i, row in enumerate(rewards)]
    order.shuffle(shuffled)
    assert {group.group_id for group in keep_groups(shuffled, fraction, 0.0)[0]} == names


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    with pytest.raises(DataError, match=r"trajectory b/1: got a reward of .*finite number"):
        keep_groups([make_group("a", [0.0, 1.0]), make_group("b", [0.0, reward])], 1.0, 0.0)


def test_a_member_counts_while_one_of_its_rows_does() -> None:
    trajectories = [make_trajectory("g", i, [[make_turn()], [make_turn()]]) for i in range(3)]
    members = [ScoredTrajectory(trajectory=t, reward=Reward(outcome=1.0)) for t in trajectories]
    group = ScoredGroup(group_id="g", prompt=trajectories[0].prompt, members=tuple(members))
    ids = [t.id for t in trajectories]
    marked = frozenset({(ids[0], 0), (ids[0], 1), (ids[1], 1)})
    (counted,) = counted_groups([group], marked)
    assert counted.members == (members[1], members[2])
    assert counted_groups([group], frozenset()) == (group,)
