"""The replay store: an append-only log of trajectories on disk with a small index in memory.

    folder/segment-00000000.bin   trajectories inserted by the first add
    folder/segment-00000001.bin   ... by the second, and so on; an empty add writes no file

The index holds what selection needs (reward parts, age, place in the log), 100 bytes a row; the
arrays stay on disk until a row is read. A row is one trajectory, stored once; ``take`` removes what
it reads. A checkpoint records a position in the log, the checksums of its files and which of their
rows are live, never a copy; what a later, abandoned run appended beyond that position is not seen,
and is overwritten as the log grows again.

Files are flushed to disk when a checkpoint names them (``state_dict``), not when they are written:
what no checkpoint names is written anew after a power cut, and the disk works while the step does.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.errors import CheckpointError
from megatron_spear.files import replacing, sync_file, sync_folder
from megatron_spear.replay.index import IntArray, ReplayIndex
from megatron_spear.replay.records import decode
from megatron_spear.replay.segment import (
    RowArray,
    map_segment,
    read_ahead,
    read_index,
    read_record,
    write_segment,
)
from megatron_spear.replay.state import require_keys
from megatron_spear.replay.table import Positions, RowTable
from megatron_spear.types import TrainSample

_ALIGNMENT = 64
"""Bytes a record read from disk starts at a multiple of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _SegmentFile:
    """A written file: its rows, its length and the checksum of its index."""

    number: int
    first_row: int
    num_rows: int
    num_bytes: int
    checksum: int


_SAVED_FILE = (*_SegmentFile.__slots__, "live")


class ReplayStore:
    """At most ``capacity`` trajectories, the oldest leaving first (FIFO); None: no limit.

    Example: with capacity 2, adding a, b and then c leaves b and c in ``index()``, in that order.
    """

    def __init__(self, folder: Path, capacity: int | None) -> None:
        self._folder = folder
        self._capacity = capacity
        self._table = RowTable()
        self._files: dict[int, _SegmentFile] = {}  # those that hold rows, by number
        self._num_live: dict[int, int] = {}  # rows that each of them still holds
        self._unsynced: set[int] = set()
        self._next_row = 0
        self._next_file = 0

    def __len__(self) -> int:
        return len(self._table)

    @property
    def next_row(self) -> int:
        """The row id the next trajectory added gets."""
        return self._next_row

    def index(self) -> ReplayIndex:
        """What selection may know of the rows that may still be taken, oldest first."""
        return self._table.index()

    def add(self, trajectories: Sequence[Sequence[TrainSample]]) -> int:
        """Append trajectories (each: all its segments); returns how many rows capacity evicted.

        Costs the bytes of the new rows. On OSError (a full disk) the store is as it was before.
        """
        if not trajectories:
            return 0
        self._folder.mkdir(parents=True, exist_ok=True)
        number, first_row = self._next_file, self._next_row
        with replacing(self._path(number)) as stream:
            rows, num_bytes, checksum = write_segment(
                stream.fileno(), trajectories, number=number, first_row=first_row
            )
        file = _SegmentFile(
            number=number,
            first_row=first_row,
            num_rows=len(rows),
            num_bytes=num_bytes,
            checksum=checksum,
        )
        self._insert(file, rows)
        self._unsynced.add(number)
        self._next_row += len(rows)
        self._next_file += 1
        return self._evict_beyond_capacity()

    def read(self, row_ids: npt.ArrayLike) -> list[list[TrainSample]]:
        """Rows in the order asked for: all segments of each, as copies. They stay.

        Raises KeyError for a row that is not stored, and CheckpointError naming the file where a
        record is gone or fails its checksum.
        """
        return self._decoded(self._table.find(row_ids))

    def take(self, row_ids: npt.ArrayLike) -> list[list[TrainSample]]:
        """``read``, and remove the rows; none where it raises."""
        positions = self._table.find(row_ids)
        taken = self._decoded(positions)
        self._remove(positions)
        return taken

    def discard(self, row_ids: npt.ArrayLike) -> int:
        """Remove rows without reading them; returns how many. KeyError as in ``read``."""
        return self._remove(self._table.find(row_ids))

    def evict_older_than(self, policy_version: int) -> int:
        """Remove rows with tokens from before ``policy_version``; returns how many."""
        return self._remove(self._table.older_than(policy_version))

    def prune(self, states: Iterable[Mapping[str, Any]]) -> int:
        """Delete files that neither a stored row nor a checkpoint needs; returns how many.

        ``states`` are the ``state_dict`` of every checkpoint that may still be resumed from. What a
        kill left half-written goes too.
        """
        needed = set(self._files)
        needed.update(file["number"] for state in states for file in state["files"])
        kept = {self._path(number) for number in needed}
        doomed = [path for path in self._folder.glob("segment-*") if path not in kept]
        for path in doomed:
            path.unlink()
        return len(doomed)

    def state_dict(self) -> dict[str, Any]:
        """The position in the log; of each file with live rows its checksum and a bitmap of them.

        Plain JSON, a bit a row. Every file it names is flushed to disk first, so that a checkpoint
        claims nothing that a power cut can lose. Raises OSError (a full disk).
        """
        self._sync()
        live = self._table.index().row_ids
        return {
            "next_row": self._next_row,
            "next_file": self._next_file,
            "files": [
                asdict(file) | {"live": _bitmap(file, live)} for file in self._files.values()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to a recorded position; every row still stored is read and verified.

        Raises CheckpointError naming the file that is missing, cut, corrupt or of another run; the
        store is then as it was before. A smaller capacity than before keeps the newest rows.
        """
        require_keys(state, ("next_row", "next_file", "files"), "replay store")
        loaded = ReplayStore(self._folder, self._capacity)
        for saved in state["files"]:
            require_keys(saved, _SAVED_FILE, "a file of the replay store")
            file = _SegmentFile(**{name: saved[name] for name in saved if name != "live"})
            loaded._insert(file, loaded._load(file, saved["live"]))
        loaded._next_row, loaded._next_file = state["next_row"], state["next_file"]
        loaded._evict_beyond_capacity()
        vars(self).update(vars(loaded))

    def _load(self, file: _SegmentFile, live: str) -> RowArray:
        """The live rows of a file, each verified."""
        path = self._path(file.number)
        positions = np.flatnonzero(np.unpackbits(np.frombuffer(base64.b64decode(live), np.uint8)))
        content = map_segment(path, file.num_bytes)
        rows = read_index(content, file.checksum, path)
        lost = positions[positions >= len(rows)]
        if len(lost):
            raise CheckpointError(
                f"{path}: the checkpoint lists replay rows {(file.first_row + lost[:5]).tolist()} "
                "that this file does not hold"
            )
        live_rows = rows[positions]
        read_ahead(content, live_rows)
        for row in live_rows:
            read_record(content, row, path)
        return live_rows

    def _decoded(self, positions: Positions) -> list[list[TrainSample]]:
        return [decode(record) for record in self._records(positions)]

    def _records(self, positions: Positions) -> list[memoryview]:
        """Copies of the records at these positions, read-only; each file is mapped once.

        They share one block of memory: large blocks come in large pages, which are quicker to get.
        """
        rows = self._table.rows(positions)
        room = -(-rows["sizes"] // _ALIGNMENT) * _ALIGNMENT
        block = np.empty(room.sum(), np.uint8)
        places = zip((np.cumsum(room) - room).tolist(), rows["sizes"].tolist(), strict=True)
        records = [block[first : first + size] for first, size in places]
        order = np.argsort(rows["row_ids"])
        for number, same_file in groupby(order, lambda i: int(rows["files"][i])):
            path, group = self._path(number), list(same_file)
            content = map_segment(path, self._files[number].num_bytes)
            read_ahead(content, rows[group])
            for i in group:
                records[i][:] = read_record(content, rows[i], path)
        return [record.data.toreadonly() for record in records]

    def _insert(self, file: _SegmentFile, rows: RowArray) -> None:
        self._table.append(rows)
        self._files[file.number] = file
        self._num_live[file.number] = len(rows)

    def _evict_beyond_capacity(self) -> int:
        if self._capacity is None:
            return 0
        return self._remove(self._table.oldest(max(0, len(self) - self._capacity)))

    def _remove(self, positions: Positions) -> int:
        """Remove rows, and forget files that hold no more."""
        numbers, counts = np.unique(self._table.rows(positions)["files"], return_counts=True)
        self._table.remove(positions)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self._num_live[number] -= count
            if not self._num_live[number]:
                del self._num_live[number], self._files[number]
        return len(positions)

    def _sync(self) -> None:
        named = self._unsynced & self._files.keys()
        for number in sorted(named):
            sync_file(self._path(number))
        if named:
            sync_folder(self._folder)
            sync_folder(self._folder.parent)
        self._unsynced.clear()

    def _path(self, number: int) -> Path:
        return self._folder / f"segment-{number:08d}.bin"


def _bitmap(file: _SegmentFile, live: IntArray) -> str:
    """Base64 of a bit a row of the file: whether its id is among the sorted ``live``."""
    first, end = np.searchsorted(live, (file.first_row, file.first_row + file.num_rows))
    bits = np.zeros(file.num_rows, np.uint8)
    bits[live[first:end] - file.first_row] = 1
    return base64.b64encode(np.packbits(bits).tobytes()).decode()
