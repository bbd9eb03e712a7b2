"""Counter-based draws: a function of the key, independent of the count, spread evenly."""

import numpy as np

from megatron_spear.algorithms.draws import raw_draws


def test_entry_does_not_depend_on_the_count() -> None:
    np.testing.assert_array_equal(raw_draws(5, 1, "a"), raw_draws(1000, 1, "a")[:5])


def test_keys_are_told_apart() -> None:
    keys: list[tuple[int | str, ...]] = [(1, 2), (12,), ("1", 2), (1, "2"), (1, 2, 0), (2, 1)]
    assert len({int(raw_draws(1, *key)[0]) for key in keys}) == len(keys)


def test_spread_evenly() -> None:
    draws = raw_draws(20_000, 0, 0, "g/0").astype(np.float64) / 2.0**64
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert abs(counts - 2000).max() < 250  # more than 5 standard deviations


def test_values_are_pinned() -> None:
    """A changed generator would change what a resumed run draws."""
    assert raw_draws(2, 0, 1, "g/0").tolist() == PINNED


PINNED = [808334289838709841, 1988598379620151854]
