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
        while len(on_the_way) > 1:
            link.wait(on_the_way.popleft()[0], deadline)
        flat = packer.pack(bucket, tensors[bucket.target], [flat for _, flat in on_the_way])
        on_the_way.append((link.send(flat, first_receiver + bucket.target), flat))
    for work, _ in on_the_way:
        link.wait(work, deadline)
    return sum(bucket.num_bytes for bucket in buckets)


class Packer:
    """Messages from slices, with two buffers as large as the largest message packed so far."""

    def __init__(self, slices: Mapping[str, TensorSlice]) -> None:
        self._slices = slices
        self._buffers: list[Tensor | None] = [None, None]

    def pack(
        self, bucket: Bucket, tensors: Sequence[HeldTensor], in_use: Sequence[Tensor] = ()
    ) -> Tensor:
        """The message uint8 ``[num_bytes]``: a view of the weights, or of the buffer that none of
        ``in_use`` is a view of."""
        first = self._cut(bucket.pieces[0], tensors[bucket.pieces[0].tensor])
        if len(bucket.pieces) == 1 and len(first) == 1 and first[0].is_contiguous():
            return first[0].reshape(-1).view(torch.uint8)
        flat = self._free_buffer(bucket.num_bytes, in_use, first[0].device)[: bucket.num_bytes]
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

    def _free_buffer(
        self, num_bytes: int, in_use: Sequence[Tensor], device: torch.device
    ) -> Tensor:
        taken = {flat.untyped_storage().data_ptr() for flat in in_use}
        for number, buffer in enumerate(self._buffers):
            if buffer is not None and buffer.untyped_storage().data_ptr() in taken:
                continue
            if buffer is None or len(buffer) < num_bytes:
                buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
                self._buffers[number] = buffer
            return buffer
        raise AssertionError("two buffers are enough for one message on its way")


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
