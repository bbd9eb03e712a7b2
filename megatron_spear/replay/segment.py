"""A segment file: the trajectories of one insertion, and an index of them behind.

    file    = MAGIC (8 bytes) | record | record | ... | index | trailer          (little endian)
    index   = one ``ROW`` a record: what selection needs, and the record's place and checksum
    trailer = number of rows u32 | checksum of the index u64

Every byte of a record is checksummed once, by its row; the rows by the trailer and, in a
checkpoint, by the file's entry: one that names the index's checksum names the whole content.
Checksums are 64-bit XXH3, ten times as fast as a crc32. Files are written once, whole, and never
changed; to resume, their indexes are read and no record is decoded.
"""

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_spear.errors import CheckpointError
from megatron_spear.replay.records import describe, encode
from megatron_spear.types import TrainSample

MAGIC = b"MSREPL02"
RESTORE = "restore the file, or resume the run: it goes back to a checkpoint that does not need it"
"""What to do about a damaged file."""

COLUMNS = {
    "row_ids": "<i8",
    "policy_versions": "<i8",
    "outcome": "<f8",
    "intrinsic": "<f8",
    "format": "<f8",
    "advantages": "<f8",
    "num_tokens": "<i8",
    "prompt_keys": "<u8",
    "trajectory_keys": "<u8",
    "files": "<i8",
    "offsets": "<i8",
    "sizes": "<i8",
    "checksums": "<u8",
}
"""Those of ``ReplayIndex``; then file number, first byte, bytes and checksum of the record."""

ROW = np.dtype(list(COLUMNS.items()))
RowArray = npt.NDArray[np.void]

_TRAILER = struct.Struct("<IQ")
_MAX_PIECES = 512
"""Pieces handed to the system at once; it takes at most 1024."""


def write_segment(
    descriptor: int, trajectories: Sequence[Sequence[TrainSample]], number: int, first_row: int
) -> tuple[RowArray, int, int]:
    """Write file ``number`` with rows from ``first_row`` on.

    Gives ``ROW [N]``, the bytes written and the index's checksum.

    The arrays are written from where they are, many at a time: nothing is copied to join them.
    Raises OSError (a full disk).
    """
    found: list[tuple[float, ...]] = []
    offset, waiting = len(MAGIC), [memoryview(MAGIC)]
    for row_id, samples in enumerate(trajectories, first_row):
        record = encode(samples)
        size, checksum = _size(record), xxhash.xxh3_64()
        for piece in record:
            checksum.update(piece)
        found.append((row_id, *describe(samples), number, offset, size, checksum.intdigest()))
        offset += size
        waiting += record
        if len(waiting) >= _MAX_PIECES:
            _write(descriptor, waiting)
            waiting = []
    rows = np.array(found, ROW)
    index = rows.tobytes()
    checksum_of_index = xxhash.xxh3_64_intdigest(index)
    behind = index + _TRAILER.pack(len(rows), checksum_of_index)
    _write(descriptor, [*waiting, memoryview(behind)])
    return rows, offset + len(behind), checksum_of_index


def map_segment(path: Path, num_bytes: int) -> mmap.mmap:
    """The file, mapped to read; CheckpointError where it is not there or not of this length.

    It is unmapped when the last reference to the map and to arrays in it is gone.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length == num_bytes:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing, but its replay rows are needed; leave the replay folder in place "
            f"while a run uses it; {RESTORE}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from error
    raise CheckpointError(
        f"{path}: got {length} bytes, expected {num_bytes}: truncated or overwritten by another "
        f"run; {RESTORE}"
    )


def read_index(content: mmap.mmap, checksum: int | None, source: Path) -> RowArray:
    """``ROW [N]`` of a mapped file; CheckpointError if it is not ours, corrupt, or not that of
    ``checksum`` (None: no checkpoint names one)."""
    if content[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{source}: not a replay segment of this version (starts with "
            f"{content[: len(MAGIC)]!r}, expected {MAGIC!r}); {RESTORE}"
        )
    end = len(content) - _TRAILER.size
    if end < len(MAGIC):
        raise CheckpointError(f"{source}: cut off after {len(content)} bytes; {RESTORE}")
    num_rows, saved = _TRAILER.unpack_from(content, end)
    index = content[max(end - num_rows * ROW.itemsize, 0) : end]
    found = xxhash.xxh3_64_intdigest(index)
    if found != saved:
        raise CheckpointError(
            f"{source}: the index is corrupt (checksum {found:016x}, its trailer says "
            f"{saved:016x}); {RESTORE}"
        )
    if checksum is not None and found != checksum:
        raise CheckpointError(
            f"{source}: got an index with checksum {found:016x}, the checkpoint expects "
            f"{checksum:016x}: overwritten by another run; {RESTORE}"
        )
    return np.frombuffer(index, ROW)


def read_ahead(content: mmap.mmap, rows: RowArray) -> None:
    """Let the disk fetch these records at once, not one page after the other as they are read."""
    for offset, size in zip(rows["offsets"].tolist(), rows["sizes"].tolist(), strict=True):
        start = offset - offset % mmap.PAGESIZE
        content.madvise(mmap.MADV_WILLNEED, start, offset + size - start)


def read_record(content: mmap.mmap, row: np.void, source: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a ``ROW``'s record, in the map; CheckpointError if they fail its checksum."""
    offset = int(row["offsets"])
    record = np.frombuffer(content, np.uint8, int(row["sizes"]), offset)
    if xxhash.xxh3_64_intdigest(record.data) != row["checksums"]:
        raise CheckpointError(
            f"{source}: the replay record at byte {offset} is corrupt (its checksum does not "
            f"match); {RESTORE}"
        )
    return record


def _write(descriptor: int, pieces: list[memoryview]) -> None:
    for first in range(0, len(pieces), _MAX_PIECES):
        part = pieces[first : first + _MAX_PIECES]
        missing = _size(part) - os.writev(descriptor, part)
        while missing:  # the disk is about to be full; the next call takes the rest, or says so
            missing -= os.write(descriptor, b"".join(part)[-missing:])


def _size(pieces: Sequence[memoryview]) -> int:
    return sum(piece.nbytes for piece in pieces)
