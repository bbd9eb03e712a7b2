"""A segment file: the trajectories of one insertion, and an index of them behind.

    file    = MAGIC (8 bytes) | record | record | ... | index | trailer          (little endian)
    index   = one ``ROW`` a record: what selection needs, and the record's place and crc32
    trailer = number of rows u32 | crc32 of the index u32

Every byte of a record is checksummed once, by its row; the rows by the trailer and, in a
checkpoint, by the file's entry: one that names the index's crc32 names the whole content. Files are
written once, whole, and never changed; to resume, their indexes are read and no record is decoded.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
    "crc32s": "<u4",
}
"""Those of ``ReplayIndex``; then file number, first byte, bytes and crc32 of the record."""

ROW = np.dtype(list(COLUMNS.items()))
RowArray = npt.NDArray[np.void]

_TRAILER = struct.Struct("<II")
_MAX_PIECES = 512
"""Pieces handed to the system at once; it takes at most 1024."""


def write_segment(
    descriptor: int, trajectories: Sequence[Sequence[TrainSample]], number: int, first_row: int
) -> tuple[RowArray, int, int]:
    """Write file ``number`` with rows from ``first_row`` on: (``ROW [N]``, bytes, index's crc32).

    The arrays are written from where they are; while a thread waits for the system to take them,
    the next ones are checksummed. Raises OSError (a full disk).
    """
    found: list[tuple[float, ...]] = []
    offset, waiting = len(MAGIC), [memoryview(MAGIC)]
    with ThreadPoolExecutor(max_workers=1) as writer:
        written: list[Future[None]] = []
        for row_id, samples in enumerate(trajectories, first_row):
            record = encode(samples)
            size, crc32 = _size(record), 0
            for piece in record:
                crc32 = zlib.crc32(piece, crc32)
            found.append((row_id, *describe(samples), number, offset, size, crc32))
            offset += size
            waiting += record
            if len(waiting) >= _MAX_PIECES:
                written.append(writer.submit(_write, descriptor, waiting))
                waiting = []
        for future in written:
            future.result()
    rows = np.array(found, ROW)
    index = rows.tobytes()
    index_crc32 = zlib.crc32(index)
    behind = index + _TRAILER.pack(len(rows), index_crc32)
    _write(descriptor, [*waiting, memoryview(behind)])
    return rows, offset + len(behind), index_crc32


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


def read_index(content: mmap.mmap, crc32: int, source: Path) -> RowArray:
    """``ROW [N]`` of a mapped file; CheckpointError if it is not ours or not that of ``crc32``."""
    if content[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{source}: not a replay segment of this version (starts with "
            f"{content[: len(MAGIC)]!r}, expected {MAGIC!r}); {RESTORE}"
        )
    end = len(content) - _TRAILER.size
    num_rows, saved_crc32 = _TRAILER.unpack_from(content, end)
    index = content[max(end - num_rows * ROW.itemsize, 0) : end]
    found = zlib.crc32(index)
    if found != saved_crc32:
        raise CheckpointError(
            f"{source}: the index is corrupt (crc32 {found:08x}, its trailer says "
            f"{saved_crc32:08x}); {RESTORE}"
        )
    if found != crc32:
        raise CheckpointError(
            f"{source}: got an index with crc32 {found:08x}, the checkpoint expects {crc32:08x}: "
            f"overwritten by another run; {RESTORE}"
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
    if zlib.crc32(record.data) != row["crc32s"]:
        raise CheckpointError(
            f"{source}: the replay record at byte {offset} is corrupt (its crc32 does not match); "
            f"{RESTORE}"
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
