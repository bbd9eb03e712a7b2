"""Which groups stay: by spread, by fraction, and independent of the order of arrival."""

import random

import pytest

from megatron_spear.algorithms.filters import keep_groups
from megatron_spear.testing.hand_made import make_group
from megatron_spear.types import ScoredGroup


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


def test_ties_go_to_the_smaller_id_in_any_order() -> None:
    rewards = [0.7, 1.0, 0.9, 0.8, 0.1, 0.6]
    groups = [make_group(name, rewards) for name in "abcd"]
    # the same rewards in another order: numpy's std is larger in the last digit
    groups[2] = make_group("c", [1.0, 0.6, 0.7, 0.9, 0.1, 0.8])
    for seed in range(10):
        random.Random(seed).shuffle(groups)
        kept, _ = keep_groups(groups, 0.5, 0.0)
        assert sorted(_ids(kept)) == ["a", "b"]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 1), (0.29, 29), (0.999, 99), (1.0, 100)])
def test_fraction_floors_but_keeps_one(fraction: float, count: int) -> None:
    groups = [make_group(f"{i:03d}", [0.0, float(i)]) for i in range(100)]
    assert len(keep_groups(groups, fraction, 0.0)[0]) == count


def test_empty_groups_never_count() -> None:
    kept, metrics = keep_groups([make_group("a", []), make_group("b", [1.0])], 1.0, 0.0)
    assert _ids(kept) == ["b"]
    assert metrics["filter/num_empty_groups"] == 1
    assert keep_groups([], 0.75, 0.0)[0] == ()
