"""What lies in a replay folder, read without changing it: for people, not for training.

Unlike ``ReplayStore.load_state_dict`` nothing ends at the first fault: each damaged file and record
is named, and all that is whole is read. The folder may be that of a run that goes on.

Which rows may still be taken is known from a checkpoint alone:

| file | its rows are |
|---|---|
| named by the checkpoint | live where its bitmap says so |
| before its position, not named | spent; an older checkpoint may need them |
| beyond its position | written since, taken as live |
| without any checkpoint | taken as live |
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_spear.errors import CheckpointError, DataError
from megatron_spear.replay.records import decode
from megatron_spear.replay.segment import ROW, RowArray, map_segment, read_index, read_record
from megatron_spear.replay.state import require_keys
from megatron_spear.types import TrainSample

PATTERN = "segment-*.bin"
_STATE = ("next_row", "next_file", "files")
_NAMED = ("number", "first_row", "num_rows", "num_bytes", "checksum", "live")


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentContent:
    """One file: ``ROW [N]`` of its index (none if that cannot be read), which rows are live and
    which whole, bool ``[N]``."""

    path: Path
    num_bytes: int
    rows: RowArray
    live: npt.NDArray[np.bool_]
    whole: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFacts:
    """What a record says of its trajectory beyond the index."""

    prompt_id: str
    outcome: float
    num_segments: int
    num_turns: int
    tool_calls: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayContents:
    """The files in their order, and each fault as a line. ``missing`` are files that the checkpoint
    names and that are not there."""

    folder: Path
    files: tuple[SegmentContent, ...]
    faults: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def rows(self) -> RowArray:
        """``ROW [N]``: the live rows that are whole, oldest first."""
        parts = [file.rows[file.live & file.whole] for file in self.files]
        return np.concatenate(parts) if parts else np.zeros(0, ROW)

    @property
    def num_written(self) -> int:
        """Rows in the folder, spent ones too."""
        return sum(len(file.rows) for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(file.num_bytes for file in self.files)

    def facts(self) -> list[RowFacts]:
        """Of each of ``rows``, in that order. A file that a run has deleted meanwhile is a
        CheckpointError."""
        found = []
        for file in self.files:
            rows = file.rows[file.live & file.whole]
            content = map_segment(file.path, file.num_bytes) if len(rows) else None
            for row in rows:
                assert content is not None
                found.append(_facts(decode(read_record(content, row, file.path).data)))
        return found

    def samples(self, row_id: int) -> list[TrainSample]:
        """The segments of one row, live or spent; DataError where it is not there, CheckpointError
        where it is damaged."""
        for file in self.files:
            (at,) = np.flatnonzero(file.rows["row_ids"] == row_id)[:1].tolist() or (None,)
            if at is not None:
                content = map_segment(file.path, file.num_bytes)
                return decode(read_record(content, file.rows[at], file.path).data)
        known = [file.rows["row_ids"] for file in self.files if len(file.rows)]
        there = f"{known[0][0]} to {known[-1][-1]}" if known else "none"
        raise DataError(f"{self.folder} has no row {row_id}; its files hold rows {there}")


def read_contents(folder: Path, state: Mapping[str, Any] | None = None) -> ReplayContents:
    """Read the files of a replay folder and check every record of them.

    ``state`` is the store's in a checkpoint (``ReplayStore.state_dict``). Raises CheckpointError
    where it is none; a damaged file is a fault of the result.
    """
    named: dict[int, Mapping[str, Any]] = {}
    next_file = None
    if state is not None:
        require_keys(state, _STATE, "replay store")
        for saved in state["files"]:
            require_keys(saved, _NAMED, "a file of the replay store")
        named, next_file = {saved["number"]: saved for saved in state["files"]}, state["next_file"]
    paths = {int(path.stem.rpartition("-")[2]): path for path in sorted(folder.glob(PATTERN))}
    files, faults = [], []
    for number, path in paths.items():
        spent = next_file is not None and number < next_file and number not in named
        try:
            content, found = _read(path, named.get(number), spent)
        except FileNotFoundError:  # the run has just deleted it
            continue
        files.append(content)
        faults += found
    missing = [f"segment-{number:08d}.bin" for number in sorted(set(named) - set(paths))]
    faults += [f"{name}: missing, but the checkpoint needs rows of it" for name in missing]
    return ReplayContents(
        folder=folder, files=tuple(files), faults=tuple(faults), missing=tuple(missing)
    )


def _read(
    path: Path, named: Mapping[str, Any] | None, spent: bool
) -> tuple[SegmentContent, list[str]]:
    size, rows, faults = path.stat().st_size, np.zeros(0, ROW), []
    whole = np.zeros(0, np.bool_)
    try:
        if not size:
            raise CheckpointError(f"{path}: empty")
        content = map_segment(path, size if named is None else named["num_bytes"])
        rows = read_index(content, named["checksum"] if named else None, path)
        whole = np.ones(len(rows), np.bool_)
        for at, row in enumerate(rows):
            try:
                read_record(content, row, path)
            except CheckpointError as error:
                whole[at] = False
                faults.append(f"row {row['row_ids']}: {_short(error, path)}")
    except CheckpointError as error:
        faults.append(_short(error, path))
    live = np.full(len(rows), not spent)
    if named is not None:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(named["live"]), np.uint8))
        live = bits[: len(rows)].astype(np.bool_)
    made = SegmentContent(path=path, num_bytes=size, rows=rows, live=live, whole=whole)
    return made, faults


def _facts(samples: list[TrainSample]) -> RowFacts:
    return RowFacts(
        prompt_id=samples[0].prompt_id,
        outcome=samples[0].reward.outcome,
        num_segments=len(samples),
        num_turns=sum(len(sample.turn_starts) for sample in samples),
        tool_calls=sum(sample.tool_calls for sample in samples),
    )


def _short(error: CheckpointError, path: Path) -> str:
    """The file's name in place of its path, without the advice for a run that is resumed."""
    return str(error).replace(str(path), path.name).partition("; ")[0]
