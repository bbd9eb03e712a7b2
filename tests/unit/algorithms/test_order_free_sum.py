"""The order-free sum: by hand, its error bound, and that no order or split changes a bit of it."""

import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spear.algorithms.order_free_sum import order_free_sum


def test_by_hand() -> None:
    assert order_free_sum(np.array([1.0, -3.0])) == -2.0
    assert order_free_sum(np.zeros(0)) == order_free_sum(np.zeros(4)) == 0.0
    assert order_free_sum(np.array([2.0**20, 2.0**-30, 2.0**-30])) == 2.0**20, "cut to 2**-25"


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1), st.randoms())
def test_any_order_and_within_the_bound(terms: list[float], random: Random) -> None:
    total = order_free_sum(np.array(terms))
    bound = len(terms) * 2.0**-45 * max(map(abs, terms))
    exact = sum(map(Fraction, terms))
    assert abs(Fraction(total) - exact) <= Fraction(bound) + Fraction(math.ulp(total))
    random.shuffle(terms)
    assert order_free_sum(np.array(terms)) == total


def test_many_float32_terms_of_like_size_are_added_exactly() -> None:
    terms = np.random.default_rng(0).uniform(-8, -1, 300_001).astype(np.float32)
    assert order_free_sum(terms) == math.fsum(terms.tolist()) == order_free_sum(terms[::-1])


@pytest.mark.parametrize("scale", [1e-320, 1e-42, 1e300])
def test_the_smallest_and_the_greatest(scale: float) -> None:
    total = order_free_sum(np.array([1.0, 2.0, -0.5]) * scale)
    assert total == pytest.approx(2.5 * scale, rel=1e-12, abs=3 * 2.0**-1000)


def test_equal_terms_fill_the_integers_without_overflow() -> None:
    assert order_free_sum(np.full(200_000, 1 - 2.0**-50)) == pytest.approx(200_000, rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan(bad: float) -> None:
    assert math.isnan(order_free_sum(np.array([1.0, bad, 2.0])))
