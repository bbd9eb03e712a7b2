"""How long a demonstration looks around: a geometric number, cut."""

import random

import pytest

from megatron_spear.envs.demonstration import patience


def test_no_patience():
    assert patience(random.Random(0), 0.0, 6) == 0


@pytest.mark.parametrize("mean", [0.5, 2.0])
def test_geometric_with_this_mean(mean):
    rng = random.Random(1)
    drawn = [patience(rng, mean, 1000) for _ in range(20_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.05)
    assert drawn.count(0) / len(drawn) == pytest.approx(1 / (1 + mean), rel=0.05)


def test_never_more_than_the_most():
    rng = random.Random(2)
    assert max(patience(rng, 50.0, 4) for _ in range(500)) == 4
