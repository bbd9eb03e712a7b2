"""Attention where each rank has a part of every sequence: keys and values are gathered.

Context parallelism as Llama 3 was trained with (arXiv 2407.21783, section 3.3.2). A rank makes
queries, keys and values of its own tokens (``data.zigzag``), gathers all ranks' keys and values in
one collective, and its queries attend to them; on the way back the gradients of keys and values are
added up over the ranks, each taking those of its tokens. What is gathered is small where query
heads share keys and values; ``policy.recompute`` gathers again instead of keeping it.

In half precision on a GPU a rank's two chunks of a sequence are queries of their own, and the keys
of each are all up to its end, which is what the flash kernel's causal mask says of fewer queries
than keys: the last query sees the last key. Elsewhere queries and keys are laid out one sequence a
row, with a mask by position.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_spear.data.packing import TrainBatch
from megatron_spear.data.zigzag import zigzag_order
from megatron_spear.policy.attention import (
    Gather,
    Lay,
    PackedAttention,
    PackedLayout,
    Rotary,
    padded_index,
    turn,
)


@dataclass
class ContextLayout(PackedLayout):
    """Where a rank's T / C queries go and which of all T keys they see; C ranks in ``group``.

    Keys come one rank's after the other's. ``cos``, ``sin``: ``[T / C, 1, D / 2]``. Laid out, the
    fields of ``PackedLayout`` are the queries', ``keys`` those of the keys, and ``mask`` bool
    ``[S, 1, L / C, L]`` is True where a query sees a key. Packed, ``key_rows`` int64 ``[K]`` are
    the keys of each of the 2 S chunks of queries, ``cu_seqlens_q`` and ``cu_seqlens_kv`` int32
    ``[2 S + 1]`` say where a chunk's queries and keys begin.
    """

    group: dist.ProcessGroup | None = None
    keys: PackedLayout | None = None
    mask: Tensor | None = None
    key_rows: Tensor | None = None


def context_layout(
    batch: TrainBatch,
    rotary: Rotary,
    rank: int,
    ranks: int,
    group: dist.ProcessGroup | None,
    *,
    packed: bool = False,
) -> ContextLayout:
    """The layout of ``batch``, a rank's part of a micro-batch, shared by all layers."""
    cos, sin = (t.index_select(0, batch.position_ids) for t in rotary.tables(batch.max_seqlen))
    order = zigzag_order(batch.cu_seqlens, ranks).flatten()
    index = (_chunk_index if packed else _padded_index)(batch, order, rank, ranks)
    # Megatron takes its plain path with this format, as with PackedLayout
    return ContextLayout(qkv_format="sbhd", cos=cos, sin=sin, group=group, **index)


def _padded_index(batch: TrainBatch, order: Tensor, rank: int, ranks: int) -> dict[str, Any]:
    """Queries and keys one sequence a row. ``order`` int64 ``[T]``: the gathered keys' tokens."""
    cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
    sequences = len(cu_seqlens) - 1
    key_rows, key_places = padded_index(cu_seqlens, longest)
    rows, places = padded_index(cu_seqlens // ranks, longest // ranks)
    positions = batch.position_ids[rows].view(sequences, 1, -1, 1)
    return {
        "rows": rows,
        "places": places,
        "num_sequences": sequences,
        "longest": longest // ranks,
        "keys": PackedLayout(
            rows=order.argsort()[key_rows],
            places=key_places[order],
            num_sequences=sequences,
            longest=longest,
        ),
        "mask": torch.arange(longest, device=rows.device) <= positions,
    }


def _chunk_index(batch: TrainBatch, order: Tensor, rank: int, ranks: int) -> dict[str, Any]:
    """Two chunks of queries a sequence and all keys up to the end of each; ``order`` as above.

    Example: of a sequence of 8 tokens on 2 ranks, rank 0 has queries 0, 1 with keys 0 to 1 and
    queries 6, 7 with keys 0 to 7; rank 1 queries 2, 3 with keys 0 to 3 and 4, 5 with 0 to 5.
    """
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
    size = lengths // (2 * ranks)  # of a chunk
    seen = torch.stack(((rank + 1) * size, (2 * ranks - rank) * size), 1).flatten()
    ends = seen.cumsum(0)
    total = int(ends[-1])
    offsets = starts.repeat_interleave(2) - (ends - seen)
    tokens = torch.arange(total, device=order.device)
    tokens = tokens + torch.repeat_interleave(offsets, seen, output_size=total)
    longest = batch.max_seqlen // (2 * ranks)
    return {
        "key_rows": order.argsort()[tokens],
        "cu_seqlens_q": F.pad(size.repeat_interleave(2).cumsum(0), (1, 0)).int(),
        "cu_seqlens_kv": F.pad(ends, (1, 0)).int(),
        "max_seqlen_q": longest,
        "max_seqlen_kv": (2 * ranks - rank) * longest,
    }


class ContextAttention(PackedAttention):
    """``PackedAttention`` for a rank's part of the sequences, ``[T / C, 1, heads, D]``."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        layout = packed_seq_params
        assert isinstance(layout, ContextLayout), "the policy hands every batch with its layout"
        both = torch.cat((turn(key.squeeze(1), layout), value.squeeze(1)), 1)
        # Megatron's name; it gathers along the tokens, and adds gradients up on the way back
        both = gather_from_sequence_parallel_region(both, group=layout.group)
        attend = attend_packed if layout.rows is None else attend_laid_out
        return attend(turn(query.squeeze(1), layout), both, layout, self.softmax_scale)


def attend_laid_out(
    query: Tensor, both: Tensor, layout: ContextLayout, scale: float | None
) -> Tensor:
    """``[T / C, 1, heads * D]`` of turned queries ``[T / C, heads, D]`` and all ranks' turned keys
    and values, ``both`` ``[T, 2 groups, D]``."""
    q = Lay.apply(query, layout, False).transpose(1, 2)
    k, v = Lay.apply(both, layout.keys, False).transpose(1, 2).chunk(2, 1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=layout.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return Gather.apply(out.transpose(1, 2), layout)


def attend_packed(
    query: Tensor, both: Tensor, layout: ContextLayout, scale: float | None
) -> Tensor:
    """As ``attend_laid_out``, by torch's flash kernel."""
    from torch.nn.attention.varlen import varlen_attn

    key, value = both.index_select(0, layout.key_rows).chunk(2, 1)
    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens_q,
        layout.cu_seqlens_kv,
        layout.max_seqlen_q,
        layout.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.flatten(1).unsqueeze(1)
