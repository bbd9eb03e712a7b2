"""What travels between training and engine ranks, and the message that says so to an engine rank.

Imported in the engines' environments too: standard library and torch only.
"""

import functools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: each piece of a bucket begins at a multiple, so that it can be viewed in its dtype."""

ON_THE_WAY = 8
"""Messages that a rank has begun at a time, at most; of these, two may be in buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldTensor:
    """What an engine rank holds of a Hugging Face tensor of ``shape``: entries ``start`` to
    ``stop`` along ``axis``. ``dtype`` is torch's name, as ``bfloat16``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int
    start: int
    stop: int

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of the held part."""
        size = self.stop - self.start
        return (*self.shape[: self.axis], size, *self.shape[self.axis + 1 :])

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows ``row`` to ``row_stop`` and columns ``column`` to ``column_stop`` of a whole tensor.

    ``tensor`` is its number among those that the receiving rank holds; a vector is one column.
    """

    tensor: int
    row: int
    row_stop: int
    column: int
    column_stop: int

    @property
    def num_values(self) -> int:
        """Rows times columns."""
        return (self.row_stop - self.row) * (self.column_stop - self.column)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Pieces that travel as one message of ``num_bytes`` from ``source``, a training rank, to
    ``target``, a rank of the replica."""

    source: int
    target: int
    pieces: tuple[Piece, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the ranks of one replica's transfers meet, and their group's name and backend."""

    host: str
    port: int
    name: str
    backend: str
    senders: tuple[int, ...]
    """Training ranks, the controller's first; in the group they come before the engine's."""
    num_receivers: int
    timeout_s: float
    """The group's own, for all its updates. Above their deadline, since NCCL's ends the process."""

    @property
    def world_size(self) -> int:
        """Members of the group."""
        return len(self.senders) + self.num_receivers


Part = tuple[tuple[HeldTensor, ...], tuple[Bucket, ...]]
"""What an engine rank holds, and its buckets in the order in which they come: the same at every
update."""


def encode_part(tensors: Sequence[HeldTensor], buckets: Sequence[Bucket]) -> bytes:
    """A rank's part of a schedule; with experts this takes most of a second."""
    message = (
        [(h.name, h.dtype, h.shape, h.axis, h.start, h.stop) for h in tensors],
        [
            (
                b.source,
                b.target,
                b.num_bytes,
                [(p.tensor, p.row, p.row_stop, p.column, p.column_stop) for p in b.pieces],
            )
            for b in buckets
        ],
    )
    return zlib.compress(json.dumps(message).encode())


@functools.lru_cache(maxsize=1)  # a rank gets the same bytes at each update
def decode_part(part: bytes) -> Part:
    """What ``encode_part`` was given."""
    tensors, buckets = json.loads(zlib.decompress(part))
    return (
        tuple(
            HeldTensor(
                name=name, dtype=dtype, shape=tuple(shape), axis=axis, start=start, stop=stop
            )
            for name, dtype, shape, axis, start, stop in tensors
        ),
        tuple(
            Bucket(
                source=source,
                target=target,
                num_bytes=num_bytes,
                pieces=tuple(_piece(*numbers) for numbers in pieces),
            )
            for source, target, num_bytes, pieces in buckets
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One update as an engine rank is told of it.

    ``update`` counts the group's updates, ``rank`` is the rank in the replica, ``limit_s`` what is
    left of the deadline; ``part`` is of ``encode_part``.
    """

    meeting: Meeting
    update: int
    rank: int
    limit_s: float
    part: bytes

    def encode(self) -> Tensor:
        """As uint8 ``[bytes]``: a line of JSON, then the part."""
        head = {
            "meeting": asdict(self.meeting),
            "update": self.update,
            "rank": self.rank,
            "limit_s": self.limit_s,
        }
        line = json.dumps(head).encode() + b"\n"
        return torch.frombuffer(bytearray(line + self.part), dtype=torch.uint8)

    @classmethod
    def decode(cls, message: Tensor) -> "Assignment":
        """What ``encode`` gave."""
        line, _, part = message.cpu().numpy().tobytes().partition(b"\n")
        values: dict[str, Any] = json.loads(line)
        meeting = values["meeting"]
        return cls(
            meeting=Meeting(**meeting | {"senders": tuple(meeting["senders"])}),
            update=values["update"],
            rank=values["rank"],
            limit_s=values["limit_s"],
            part=part,
        )


def _piece(tensor: int, row: int, row_stop: int, column: int, column_stop: int) -> Piece:
    return Piece(tensor=tensor, row=row, row_stop=row_stop, column=column, column_stop=column_stop)


def aligned(num_bytes: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def places(
    pieces: Sequence[Piece], tensors: Sequence[HeldTensor]
) -> Iterator[tuple[Piece, HeldTensor, slice]]:
    """Each piece of a bucket with its tensor and its bytes in the message."""
    start = 0
    for piece in pieces:
        held = tensors[piece.tensor]
        stop = start + piece.num_values * held.torch_dtype.itemsize
        yield piece, held, slice(start, stop)
        start = aligned(stop)


def as_rows(tensor: Tensor) -> Tensor:
    """A matrix as it is, a vector as one column."""
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def shape_as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of ``as_rows``."""
    return shape[0], prod(shape[1:])
