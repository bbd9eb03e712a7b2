"""Counter-based draws: a function of the key, independent of the count, spread evenly."""

import numpy as np
import pytest

from megatron_spear.algorithms.draws import raw_draws, smallest, stream_draws, stream_key


def test_entry_does_not_depend_on_the_count() -> None:
    np.testing.assert_array_equal(raw_draws(5, 1, "a"), raw_draws(1000, 1, "a")[:5])


def test_keys_are_told_apart() -> None:
    keys: list[tuple[int | str, ...]] = [(1, 2), (12,), ("1", 2), (1, "2"), (1, 2, 0), (2, 1)]
    assert len({int(raw_draws(1, *key)[0]) for key in keys}) == len(keys)


def test_spread_evenly() -> None:
    draws = raw_draws(20_000, 0, 0, "g/0").astype(np.float64) / 2.0**64
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert abs(counts - 2000).max() < 250  # more than 5 standard deviations


def _stream(count: int, *key: int | str) -> np.ndarray:
    return stream_draws(np.full(count, stream_key(*key), np.uint64), np.arange(count))


def test_an_entry_of_a_stream_depends_on_key_and_counter_alone() -> None:
    keys = np.array([stream_key("a"), stream_key("b"), stream_key("a")], np.uint64)
    draws = stream_draws(keys, np.array([3, 3, 7]))
    assert draws.tolist() == [_stream(4, "a")[3], _stream(4, "b")[3], _stream(8, "a")[7]]


def test_streams_are_splitmix64() -> None:
    """The published first numbers of seed 1234567."""
    draws = stream_draws(np.full(3, 1234567, np.uint64), np.arange(3))
    assert draws.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_streams_are_spread_evenly_along_and_across() -> None:
    along = _stream(20_000, 0, 0, "g/0")
    across = np.array([_stream(1, 0, 0, f"g/{i}")[0] for i in range(20_000)])
    for draws in (along, across):
        counts, _ = np.histogram(draws.astype(np.float64) / 2.0**64, bins=10, range=(0, 1))
        assert abs(counts - 2000).max() < 250  # more than 5 standard deviations


@pytest.mark.parametrize(("size", "count"), [(0, 0), (5, 0), (5, 5), (1000, 3), (5000, 400)])
def test_smallest(size: int, count: int) -> None:
    draws = _stream(size, "smallest")
    assert sorted(smallest(draws, count)) == sorted(np.argsort(draws)[:count])


def test_smallest_where_the_draws_are_all_large() -> None:
    draws = np.arange(1000, dtype=np.uint64) + np.uint64(2**63)
    assert sorted(smallest(draws[::-1].copy(), 2)) == [998, 999]


def test_values_are_pinned() -> None:
    """A changed generator would change what a resumed run draws."""
    assert raw_draws(2, 0, 1, "g/0").tolist() == PINNED
    assert stream_key(0, 1, "g/0") == PINNED_KEY


PINNED = [808334289838709841, 1988598379620151854]
PINNED_KEY = 6908151328110419129
