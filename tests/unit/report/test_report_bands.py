"""Intervals over seeds are Student's, and a band has the steps of all."""

import numpy as np
import pytest

from megatron_spear.report.bands import band_of, interval_of, t95


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 20, 21, 50, 400])
def test_95_percent_of_students_t_lie_within(freedom: int) -> None:
    """By integrating the density, after t = tan(u), which takes the tails in."""
    u = np.linspace(0, np.arctan(t95(freedom)), 200_001)
    everywhere = np.linspace(0, np.pi / 2, 200_002)[:-1]

    def mass(angles: np.ndarray) -> float:
        t = np.tan(angles)
        density = (1 + t**2 / freedom) ** (-(freedom + 1) / 2) * (1 + t**2)
        return float(np.trapezoid(density, angles))

    assert mass(u) / mass(everywhere) == pytest.approx(0.95, abs=2e-4)


def test_an_interval_is_that_of_numpys_moments() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 5)
    found = interval_of(values.tolist())
    half = 2.7764 * np.std(values, ddof=1) / np.sqrt(5)
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 5)
    assert found.low == pytest.approx(values.mean() - half)
    assert found.high == pytest.approx(values.mean() + half)


def test_one_run_has_no_interval() -> None:
    found = interval_of([0.25])
    assert (found.mean, found.low, found.high, found.n) == (0.25, None, None, 1)


def test_a_band_has_the_steps_that_all_runs_have() -> None:
    band = band_of([((1, 2, 3), (1.0, 2.0, 3.0)), ((1, 3, 4), (3.0, 5.0, 9.0))])
    assert band.steps == (1, 3)
    assert [interval.mean for interval in band.intervals] == [2.0, 4.0]
    assert band_of([]).steps == ()
