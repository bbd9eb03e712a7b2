"""Many tensors in one piece of memory: what engines receive as one message.

A bucket is the tensors' bytes one after the other, without padding (SGLang's flattened buckets, so
each tensor begins at a multiple of its item size).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron_spear.weight_sync.servers import TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Tensors and ``data``, their bytes in this order, uint8 ``[N]``."""

    tensors: tuple[TensorSpec, ...]
    data: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """N."""
        return int(self.data.numel())


def pack(
    tensors: Iterable[tuple[str, torch.Tensor]],
    bucket_bytes: int,
    allocate: Callable[[int], torch.Tensor],
) -> Iterator[Bucket]:
    """Buckets of at most ``bucket_bytes``; a tensor that is larger is alone in one of its own size.

    ``allocate`` gives memory (uint8 ``[n]``) where the receivers can read it. Two pieces take
    turns: a bucket's bytes are overwritten when the one after the next is made.

    Example: with 8 bytes, a [3] bf16, b [1] fp32, c [1] bf16: ``a`` (b would begin at 6, which is
    no multiple of 4), ``b c``.
    """
    buffers: list[torch.Tensor] = []
    specs: list[TensorSpec] = []
    filled = turn = 0

    def bucket() -> Bucket:
        nonlocal filled, turn
        made = Bucket(tensors=tuple(specs), data=buffers[turn][:filled])
        specs.clear()
        filled, turn = 0, 1 - turn
        return made

    for name, tensor in tensors:
        spec = TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
        size = spec.num_bytes
        if specs and (filled + size > bucket_bytes or filled % tensor.dtype.itemsize):
            yield bucket()
        if size > bucket_bytes:
            own = allocate(size)
            _fill(own, tensor)
            yield Bucket(tensors=(spec,), data=own)
            continue
        if len(buffers) == turn:
            buffers.append(allocate(bucket_bytes))
        _fill(buffers[turn][filled : filled + size], tensor)
        specs.append(spec)
        filled += size
    if specs:
        yield bucket()


def unpack(bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors by name, views of the bucket's bytes: what a receiver does."""
    start = 0
    for spec in bucket.tensors:
        part = bucket.data[start : start + spec.num_bytes]
        yield spec.name, part.view(spec.dtype).view(spec.shape)
        start += spec.num_bytes


def _fill(target: torch.Tensor, tensor: torch.Tensor) -> None:
    target.view(tensor.dtype).copy_(tensor.detach().reshape(-1))
