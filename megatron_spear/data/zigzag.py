"""Which tokens of a micro-batch a context-parallel rank has, and back.

For C ranks each sequence, a multiple of 2 C tokens long, is cut into 2 C equal chunks, and rank r
has chunks r and 2 C - 1 - r: one early and one late, so causal attention costs all ranks the same.
A rank's tokens stay in packed order. TransformerEngine cuts packed sequences in the same way.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from megatron_spear.data.packing import TrainBatch
from megatron_spear.errors import DataError


def zigzag_order(cu_seqlens: Tensor, ranks: int) -> Tensor:
    """int64 ``[C, T / C]``: the tokens of each rank. ``cu_seqlens`` int ``[S + 1]``.

    Example: a sequence of 8 tokens on 2 ranks: ``[[0, 1, 6, 7], [2, 3, 4, 5]]``.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = int(cu_seqlens[-1])
    sequence = torch.repeat_interleave(lengths, output_size=total)
    positions = torch.arange(total, device=cu_seqlens.device) - starts[sequence]
    chunks = positions // (lengths // (2 * ranks))[sequence]
    owners = torch.minimum(chunks, 2 * ranks - 1 - chunks)
    return owners.argsort(stable=True).view(ranks, -1)


def part_of(batch: TrainBatch, rank: int, ranks: int) -> TrainBatch:
    """The tokens of one of ``ranks`` context-parallel ranks; ``cu_seqlens`` and ``max_seqlen`` stay
    those of the whole sequences.

    Raises DataError for sequences that cannot be cut.
    """
    if ranks == 1:
        return batch
    if (batch.cu_seqlens % (2 * ranks)).any():
        raise DataError(
            f"got sequences of {batch.cu_seqlens.diff().tolist()} tokens to cut for {ranks} "
            f"context-parallel ranks, expected multiples of {2 * ranks}; pass "
            "sequence_multiple=policy.sequence_multiple to pack"
        )
    mine = zigzag_order(batch.cu_seqlens, ranks)[rank]
    whole = ("cu_seqlens", "max_seqlen")
    columns = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in whole}
    return replace(batch, **{name: column[mine] for name, column in columns.items()})


def joined(parts: Sequence[Tensor], cu_seqlens: Tensor) -> Tensor:
    """``[T]`` in packed order of what each rank has for its tokens, ``[T / C]`` each."""
    if len(parts) == 1:
        return parts[0]
    order = zigzag_order(cu_seqlens, len(parts)).flatten()
    flat = torch.cat(tuple(parts))
    return torch.empty_like(flat).index_copy_(0, order, flat)
