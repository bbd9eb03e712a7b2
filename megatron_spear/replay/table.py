"""The rows that may be taken, as columns in memory: adding and removing cost what they touch."""

import numpy as np
import numpy.typing as npt

from megatron_spear.replay.index import ReplayIndex
from megatron_spear.replay.segment import COLUMNS, ROW, RowArray

Positions = npt.NDArray[np.intp]


class RowTable:
    """``ROW`` columns of the live rows, in the order of their row ids.

    A removed row is only marked; the columns are packed when they are full, into twice the room the
    live rows need, so that a row is moved a constant number of times on average. Positions hold
    until the next ``append``.

    Example: after appending rows 0, 1, 2 and removing row 1, ``find([2])`` is ``[2]``,
    ``oldest(2)`` is ``[0, 2]`` and the length is 2.
    """

    def __init__(self) -> None:
        self._columns = {name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}
        self._alive = np.zeros(0, np.bool_)
        self._used = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: RowArray) -> None:
        """Add rows whose ids are larger than all before."""
        if self._used + len(rows) > len(self._alive):
            self._pack(2 * (self._length + len(rows)))
        end = self._used + len(rows)
        for name, column in self._columns.items():
            column[self._used : end] = rows[name]
        self._alive[self._used : end] = True
        self._used = end
        self._length += len(rows)

    def find(self, row_ids: npt.ArrayLike) -> Positions:
        """Where rows are; KeyError for a row that is not there or asked for twice."""
        wanted = np.asarray(row_ids, np.int64)
        known = self._columns["row_ids"][: self._used]
        found = np.searchsorted(known, wanted)
        there = found < self._used
        there[there] = self._alive[found[there]] & (known[found[there]] == wanted[there])
        if not there.all():
            raise KeyError(
                f"replay rows {wanted[~there][:5].tolist()} are not stored: taken, evicted or "
                "never added"
            )
        if len(np.unique(wanted)) != len(wanted):
            raise KeyError("a replay row was asked for twice")
        return found

    def oldest(self, count: int) -> Positions:
        """The ``count`` oldest rows."""
        return self._live()[:count]

    def older_than(self, policy_version: int) -> Positions:
        """The rows with tokens from before ``policy_version``."""
        versions = self._columns["policy_versions"][: self._used]
        return np.flatnonzero(self._alive[: self._used] & (versions < policy_version))

    def remove(self, positions: Positions) -> None:
        """Remove live rows."""
        self._alive[positions] = False
        self._length -= len(positions)

    def rows(self, positions: Positions) -> RowArray:
        """``ROW [N]`` at these positions, copied."""
        found = np.zeros(len(positions), ROW)
        for name, column in self._columns.items():
            found[name] = column[positions]
        return found

    def index(self) -> ReplayIndex:
        """The live rows' columns, copied."""
        live = self._live()
        return ReplayIndex(**{name: self._columns[name][live] for name in ReplayIndex.__slots__})

    def _live(self) -> Positions:
        return np.flatnonzero(self._alive[: self._used])

    def _pack(self, room: int) -> None:
        live = self._live()
        for name, column in self._columns.items():
            packed = np.zeros(room, column.dtype)
            packed[: self._length] = column[live]
            self._columns[name] = packed
        self._alive = np.arange(room) < self._length
        self._used = self._length
