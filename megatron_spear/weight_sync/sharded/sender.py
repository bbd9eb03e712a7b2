"""A training rank's part of one replica's schedule: slices into messages, messages out.

What lies in memory as it travels is sent from there. Everything else is packed, and quantized, into
one of two buffers while the other is on its way.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_spear.conversion import fp8_blocks
from megatron_spear.conversion.slices import TensorSlice
from megatron_spear.weight_sync.sharded.link import Deadline, Link
from megatron_spear.weight_sync.sharded.records import (
    ON_THE_WAY,
    Bucket,
    HeldTensor,
    Piece,
    as_rows,
    places,
)


def send(
    link: Link,
    buckets: Sequence[Bucket],
    tensors: Sequence[Sequence[HeldTensor]],
    slices: Mapping[str, TensorSlice],
    deadline: Deadline,
) -> int:
    """Send this rank's ``buckets``, in order; the bytes sent.

    ``tensors`` are those of each rank of the replica, ``slices`` what this training rank holds.
    """
    packer = Packer(slices)
    on_the_way: deque[tuple[Any, Tensor]] = deque()
    first_receiver = len(link.meeting.senders)
    for bucket in buckets:
        if len(on_the_way) == ON_THE_WAY:
            link.wait(on_the_way.popleft()[0], deadline)
        flat = packer.as_it_lies(bucket, tensors[bucket.target])
        if flat is None:
            while (free := packer.free_buffer([flat for _, flat in on_the_way])) is None:
                link.wait(on_the_way.popleft()[0], deadline)
            flat = packer.pack(bucket, tensors[bucket.target], free)
        on_the_way.append((link.send(flat, first_receiver + bucket.target), flat))
    for work, _ in on_the_way:
        link.wait(work, deadline)
    return sum(bucket.num_bytes for bucket in buckets)


class Packer:
    """Messages from slices, with two buffers as large as the largest message packed so far."""

    def __init__(self, slices: Mapping[str, TensorSlice]) -> None:
        self._slices = slices
        self._buffers: list[Tensor | None] = [None, None]

    def as_it_lies(self, bucket: Bucket, tensors: Sequence[HeldTensor]) -> Tensor | None:
        """The message uint8 ``[num_bytes]`` as a view of the weights, if it is one."""
        if len(bucket.pieces) > 1:
            return None
        (piece,) = bucket.pieces
        rows = self._cut(piece, tensors[piece.tensor])
        if len(rows) > 1 or not rows[0].is_contiguous():
            return None
        return rows[0].view(-1).view(torch.uint8)

    def free_buffer(self, in_use: Sequence[Tensor]) -> int | None:
        """The number of a buffer that none of ``in_use`` is a view of."""
        taken = {flat.untyped_storage().data_ptr() for flat in in_use}
        for number, buffer in enumerate(self._buffers):
            if buffer is None or buffer.untyped_storage().data_ptr() not in taken:
                return number
        return None

    def pack(self, bucket: Bucket, tensors: Sequence[HeldTensor], number: int) -> Tensor:
        """The message in buffer ``number``."""
        device = self._cut(bucket.pieces[0], tensors[bucket.pieces[0].tensor])[0].device
        flat = self._buffer(number, bucket.num_bytes, device)
        scales: Tensor | None = None
        for piece, held, place in places(bucket.pieces, tensors):
            target = flat[place].view(held.torch_dtype)
            if held.name.endswith(fp8_blocks.SCALE):
                assert scales is not None, "scales follow their values"
                target.copy_(scales.reshape(-1))
                continue
            rows = self._cut(piece, held)
            if held.torch_dtype is torch.float8_e4m3fn:
                values, scales = fp8_blocks.quantize(rows[0] if len(rows) == 1 else torch.cat(rows))
                target.copy_(values.reshape(-1))
                continue
            start = 0
            for part in rows:
                target[start : start + part.numel()].view(part.shape).copy_(part)
                start += part.numel()
        return flat

    def _cut(self, piece: Piece, held: HeldTensor) -> list[Tensor]:
        """The piece as matrices, its rows one after the other; views."""
        own = self._slices[held.name]
        row, column = (own.start, 0) if own.axis == 0 else (0, own.start)
        return list(
            _rows_of(
                [as_rows(block) for block in own.blocks()],
                (piece.row - row, piece.row_stop - row),
                (piece.column - column, piece.column_stop - column),
            )
        )

    def _buffer(self, number: int, num_bytes: int, device: torch.device) -> Tensor:
        buffer = self._buffers[number]
        if buffer is None or len(buffer) < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._buffers[number] = buffer
        return buffer[:num_bytes]


def _rows_of(
    blocks: Sequence[Tensor], rows: tuple[int, int], columns: tuple[int, int]
) -> Iterator[Tensor]:
    """Of blocks of rows that follow each other, the parts within ``rows`` and ``columns``."""
    begin = 0
    for block in blocks:
        start, stop = max(rows[0] - begin, 0), min(rows[1] - begin, len(block))
        if start < stop:
            yield block[start:stop, columns[0] : columns[1]]
        begin += len(block)
