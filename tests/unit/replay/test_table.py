"""The table of live rows against a plain dict, over random operations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_spear.replay.segment import COLUMNS, ROW, RowArray
from megatron_spear.replay.table import RowTable


def _rows(first: int, count: int, version: int) -> RowArray:
    rows = np.zeros(count, ROW)
    rows["row_ids"] = np.arange(first, first + count)
    rows["policy_versions"] = version
    for factor, name in enumerate(list(COLUMNS)[2:], start=2):
        rows[name] = factor * rows["row_ids"]
    return rows


_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("remove"), st.floats(0, 1)),
        st.tuples(st.just("oldest"), st.integers(0, 5)),
        st.tuples(st.just("older"), st.integers(0, 12)),
    ),
    max_size=12,
)


@given(_OPERATIONS, st.integers(0, 2**32 - 1))
def test_as_a_dict_would(operations: list[tuple[str, float]], seed: int) -> None:
    table, expected, next_row = RowTable(), dict[int, int](), 0
    for version, (operation, amount) in enumerate(operations):
        if operation == "append":
            table.append(_rows(next_row, int(amount), version))
            expected |= dict.fromkeys(range(next_row, next_row + int(amount)), version)
            next_row += int(amount)
            continue
        if operation == "remove":
            draw = np.random.default_rng(seed + version)
            doomed = draw.permutation(list(expected))[: int(amount * len(expected))].tolist()
            found = table.find(doomed)
        elif operation == "oldest":
            doomed, found = list(expected)[: int(amount)], table.oldest(int(amount))
        else:
            doomed = [row for row, made in expected.items() if made < amount]
            found = table.older_than(int(amount))
        assert table.rows(found)["row_ids"].tolist() == doomed
        assert table.rows(found)["sizes"].tolist() == [11 * row for row in doomed]
        table.remove(found)
        expected = {row: made for row, made in expected.items() if row not in doomed}
        index = table.index()
        assert len(table) == len(index) == len(expected)
        assert index.row_ids.tolist() == list(expected)
        assert index.policy_versions.tolist() == list(expected.values())
        assert index.trajectory_keys.tolist() == [8 * row for row in expected]


def test_rows_that_are_not_there() -> None:
    table = RowTable()
    for row_ids in ([0], [-1]):
        with pytest.raises(KeyError, match="not stored"):
            table.find(row_ids)
    table.append(_rows(0, 3, 0))
    table.remove(table.find([1]))
    with pytest.raises(KeyError, match=r"\[1, 3, -1\]"):
        table.find([0, 1, 3, -1])
    assert table.find([]).tolist() == [] and table.find([2, 0]).tolist() == [2, 0]


def test_room_follows_the_live_rows() -> None:
    """A thousand rounds of ten rows in and ten out need room for some tens of rows."""
    table = RowTable()
    for step in range(1000):
        table.append(_rows(10 * step, 10, step))
        table.remove(table.oldest(max(0, len(table) - 20)))
    assert table.oldest(20).max() < 100
    assert table.index().row_ids.tolist() == list(range(9980, 10000))
