"""The replay store: an append-only log of trajectories on disk with a small index in memory.

    folder/segment-00000000.bin   trajectories inserted by the first add
    folder/segment-00000001.bin   ... by the second, and so on; an empty add writes no file

The index holds what selection needs (reward parts, age, place in the log); the arrays stay on disk
until a row is taken. A row is one trajectory, stored once and taken at most once. A checkpoint
records a position in the log with the checksums of its files, never a copy; what a later, abandoned
run appended beyond that position is not seen, and is overwritten as the log grows again.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.errors import CheckpointError
from megatron_spear.files import write_whole
from megatron_spear.replay.index import ReplayIndex, key_of
from megatron_spear.replay.records import MAGIC, RESTORE, decode, encode, split_records
from megatron_spear.replay.state import require_keys
from megatron_spear.types import Reward, TrainSample, TrajectoryId


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayRow:
    """What the index knows of one stored trajectory.

    ``row_id`` counts insertions; ``policy_version`` is the oldest among its tokens; the record is
    ``size`` bytes at ``offset`` of segment file number ``file``.
    """

    row_id: int
    trajectory_id: TrajectoryId
    prompt_id: str
    reward: Reward
    advantage: float
    num_tokens: int
    policy_version: int
    file: int
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _SegmentFile:
    """A written file: the row id of its first record, its length and its checksum."""

    number: int
    first_row: int
    num_bytes: int
    crc32: int


class ReplayStore:
    """At most ``capacity`` trajectories, the oldest leaving first (FIFO); None: no limit.

    Example: with capacity 2, adding a, b and then c leaves b and c as candidates, in that order.
    """

    def __init__(self, folder: Path, capacity: int | None) -> None:
        self._folder = folder
        self._capacity = capacity
        self._rows: dict[int, ReplayRow] = {}  # by row id, so oldest first
        self._files: dict[int, _SegmentFile] = {}  # those that hold rows, by number
        self._next_row = 0
        self._next_file = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def next_row(self) -> int:
        """The row id the next trajectory added gets."""
        return self._next_row

    def add(self, trajectories: Sequence[Sequence[TrainSample]]) -> int:
        """Append trajectories (each: all its segments); returns how many rows capacity evicted.

        Costs the bytes of the new rows. The file is complete on disk when this returns.
        """
        if not trajectories:
            return 0
        content = MAGIC + b"".join(encode(samples) for samples in trajectories)
        file = _SegmentFile(
            number=self._next_file,
            first_row=self._next_row,
            num_bytes=len(content),
            crc32=zlib.crc32(content),
        )
        path = self._path(file.number)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        rows = _index(file, content, trajectories, str(path))
        self._files[file.number] = file
        self._rows.update((row.row_id, row) for row in rows)
        self._next_row += len(trajectories)
        self._next_file += 1
        return self._evict_beyond_capacity()

    def index(self) -> ReplayIndex:
        """What selection may know of the rows that may still be taken, oldest first."""
        rows = self.candidates()
        return ReplayIndex(
            row_ids=np.array([row.row_id for row in rows], np.int64),
            policy_versions=np.array([row.policy_version for row in rows], np.int64),
            outcome=np.array([row.reward.outcome for row in rows], np.float64),
            intrinsic=np.array([row.reward.intrinsic for row in rows], np.float64),
            format=np.array([row.reward.format for row in rows], np.float64),
            advantages=np.array([row.advantage for row in rows], np.float64),
            num_tokens=np.array([row.num_tokens for row in rows], np.int64),
            prompt_keys=np.array([key_of(row.prompt_id) for row in rows], np.uint64),
            trajectory_keys=np.array([key_of(str(row.trajectory_id)) for row in rows], np.uint64),
        )

    def candidates(self) -> tuple[ReplayRow, ...]:
        """All rows that may still be taken, oldest first."""
        return tuple(self._rows.values())

    def take(self, row_ids: npt.ArrayLike) -> list[list[TrainSample]]:
        """Read rows and remove them, in the order asked for: all segments of each.

        Raises CheckpointError naming the file where a record is gone or fails its checksum.
        """
        taken = [self._read(self._rows[row_id]) for row_id in np.asarray(row_ids).tolist()]
        self._remove(row_ids)
        return taken

    def discard(self, row_ids: npt.ArrayLike) -> int:
        """Remove rows without reading them; returns how many."""
        return self._remove(row_ids)

    def evict_older_than(self, policy_version: int) -> int:
        """Remove rows with tokens from before ``policy_version``; returns how many."""
        return self._remove(
            [row.row_id for row in self._rows.values() if row.policy_version < policy_version]
        )

    def prune(self, states: Iterable[Mapping[str, Any]]) -> int:
        """Delete files that neither a stored row nor a checkpoint needs; returns how many.

        ``states`` are the ``state_dict`` of every checkpoint that may still be resumed from.
        """
        needed = set(self._files)
        needed.update(file["number"] for state in states for file in state["files"])
        kept = {self._path(number) for number in needed}
        doomed = [path for path in self._folder.glob("segment-*.bin") if path not in kept]
        for path in doomed:
            path.unlink()
        return len(doomed)

    def state_dict(self) -> dict[str, Any]:
        """The position in the log, the rows still stored, their files' checksums (plain JSON)."""
        return {
            "next_row": self._next_row,
            "next_file": self._next_file,
            "rows": list(self._rows),
            "files": [asdict(file) for file in self._files.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Return to a recorded position; every file still needed is read and verified.

        Raises CheckpointError naming the file that is missing, cut, corrupt or of another run, and
        where the store would hold more rows than its capacity.
        """
        require_keys(state, ("next_row", "next_file", "rows", "files"), "replay store")
        files = {saved["number"]: _SegmentFile(**saved) for saved in state["files"]}
        found = {row.row_id: row for file in files.values() for row in self._load(file)}
        lost = sorted(set(state["rows"]) - set(found))
        if lost:
            raise CheckpointError(
                f"{self._folder}: the checkpoint lists replay rows {lost[:5]} that none of its "
                "segment files holds"
            )
        self._rows = {row_id: found[row_id] for row_id in state["rows"]}
        self._files = files
        self._next_row, self._next_file = state["next_row"], state["next_file"]
        self._evict_beyond_capacity()

    def _load(self, file: _SegmentFile) -> list[ReplayRow]:
        path = self._path(file.number)
        if not path.exists():
            raise CheckpointError(
                f"{path}: missing, but the checkpoint needs its replay rows; {RESTORE}"
            )
        content = path.read_bytes()
        if len(content) != file.num_bytes or zlib.crc32(content) != file.crc32:
            raise CheckpointError(
                f"{path}: got {len(content)} bytes with crc32 {zlib.crc32(content):08x}, the "
                f"checkpoint expects {file.num_bytes} bytes with {file.crc32:08x}: truncated, "
                f"corrupt or overwritten by another run; {RESTORE}"
            )
        spans = split_records(content, str(path))
        trajectories = [decode(content[at : at + size], str(path)) for at, size in spans]
        return _index(file, content, trajectories, str(path))

    def _read(self, row: ReplayRow) -> list[TrainSample]:
        path = self._path(row.file)
        try:
            with path.open("rb") as stream:
                stream.seek(row.offset)
                record = stream.read(row.size)
        except OSError as error:
            raise CheckpointError(
                f"{path}: a replay row cannot be read ({error}); leave the replay folder in place "
                f"while a run uses it"
            ) from error
        return decode(record, str(path))

    def _evict_beyond_capacity(self) -> int:
        if self._capacity is None:
            return 0
        return self._remove(list(self._rows)[: max(0, len(self._rows) - self._capacity)])

    def _remove(self, row_ids: npt.ArrayLike) -> int:
        doomed = np.asarray(row_ids).tolist()
        for row_id in doomed:
            del self._rows[row_id]
        if doomed:
            used = {row.file for row in self._rows.values()}
            self._files = {number: f for number, f in self._files.items() if number in used}
        return len(doomed)

    def _path(self, number: int) -> Path:
        return self._folder / f"segment-{number:08d}.bin"


def _index(
    file: _SegmentFile,
    content: bytes,
    trajectories: Sequence[Sequence[TrainSample]],
    source: str,
) -> list[ReplayRow]:
    """The index entries of one file's records, in order."""
    spans = split_records(content, source)
    return [
        ReplayRow(
            row_id=file.first_row + index,
            trajectory_id=samples[0].trajectory_id,
            prompt_id=samples[0].prompt_id,
            reward=samples[0].reward,
            advantage=_mean_advantage(samples),
            num_tokens=sum(len(sample.token_ids) for sample in samples),
            policy_version=min(sample.policy_version for sample in samples),
            file=file.number,
            offset=offset,
            size=size,
        )
        for index, (samples, (offset, size)) in enumerate(zip(trajectories, spans, strict=True))
    ]


def _mean_advantage(samples: Sequence[TrainSample]) -> float:
    values = np.concatenate([s.advantages[s.response_mask] for s in samples]).astype(np.float64)
    return float(values.mean()) if len(values) else 0.0
