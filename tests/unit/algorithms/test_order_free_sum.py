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
    assert order_free_sum([np.array([1.0, -3.0, 2.0**-60])]) == -2.0
    # u = 2**-49: what is half of it or less is rounded away, three quarters are rounded up.
    assert order_free_sum([np.array([1.0, -3.0, 2.0**-50])]) == -2.0
    assert order_free_sum([np.array([1.0, -3.0, 3 * 2.0**-51])]) == -2.0 + 2.0**-49
    assert order_free_sum([]) == order_free_sum([np.zeros(0)]) == order_free_sum([np.zeros(4)]) == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.randoms(), st.integers(1, 5))
def test_any_order_and_split_within_the_bound(terms: list[float], random: Random, cut: int) -> None:
    total = order_free_sum([np.array(terms)])
    bound = len(terms) * Fraction(max(map(abs, terms))) * max(len(terms), 2) / 2**52
    assert abs(Fraction(total) - sum(map(Fraction, terms))) <= bound + Fraction(math.ulp(0.0))
    random.shuffle(terms)
    parts = [np.array(terms[at : at + cut]) for at in range(0, len(terms), cut)]
    assert order_free_sum(parts) == total


def test_many_float32_terms_of_like_size_are_added_exactly() -> None:
    terms = np.random.default_rng(0).uniform(-8, -0.1, 1_000_000).astype(np.float32)
    assert order_free_sum([terms]) == math.fsum(terms.tolist()) == order_free_sum([terms[::-1]])


@pytest.mark.parametrize("scale", [1e-320, 1e-42, 1e290])
def test_the_smallest_and_the_greatest(scale: float) -> None:
    values = np.array([1.0, 2.0, -0.5]) * scale
    assert order_free_sum([values]) == pytest.approx(math.fsum(values), rel=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan(bad: float) -> None:
    assert math.isnan(order_free_sum([np.zeros(2), np.array([1.0, bad, 2.0])]))
