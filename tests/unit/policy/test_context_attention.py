"""Attention of context-parallel ranks, here one after the other, against each sequence alone.

A fake with the documented meaning stands for torch's kernel, which needs a GPU (``tests/gpu`` has
it).
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import LlamaConfig

from megatron_spear.conversion.shape import model_shape
from megatron_spear.data.packing import TrainBatch, pack
from megatron_spear.data.zigzag import part_of, zigzag_order
from megatron_spear.policy.attention import Rotary, turn
from megatron_spear.policy.context_attention import (
    attend_laid_out,
    attend_packed,
    context_layout,
)
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Origin

SCALE = 0.3


def slow_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``[Q, heads, D]``: the last query sees all keys, the one before all but the last, and so
    on."""
    shared = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for row in range(len(query)):
        seen = len(key) - len(query) + row + 1
        for head in range(query.shape[1]):
            scores = key[:seen, head // shared] @ query[row, head] * SCALE
            out[row, head] = scores.softmax(0) @ value[:seen, head // shared]
    return out


def fake_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch's ``varlen_attn`` for the settings in use."""
    assert (scale, window_size) == (SCALE, (-1, 0))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q >= int(cu_q.diff().max()) and max_k >= int(cu_k.diff().max())
    assert len(query) == cu_q[-1] and len(key) == len(value) == cu_k[-1]
    spans = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    return torch.cat([slow_attention(query[a:b], key[c:d], value[c:d]) for (a, b), (c, d) in spans])


def micro_batch(ranks: int) -> TrainBatch:
    """Sequences of several lengths, the shortest of one token a chunk, and padding."""
    samples = [make_sample(mask=[1] * length) for length in (25, 1, 7, 40)]
    packed = pack(
        samples,
        [np.zeros(len(sample.token_ids)) for sample in samples],
        [Origin.ON_POLICY] * len(samples),
        tokens_per_microbatch=1000,
        sequence_multiple=2 * ranks,
        pad_multiple=9,
    )
    return packed.micro_batches[0][0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("ranks", "groups"), [(2, 2), (3, 4)])
def test_equals_each_sequence_alone(
    ranks: int, groups: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen)
    batch = micro_batch(ranks)
    total, heads, width = batch.num_tokens, 4, 8
    sizes = {"hidden_size": 32, "num_attention_heads": heads}
    rotary = Rotary(model_shape(LlamaConfig(**sizes)), torch.device("cpu"), torch.float64)
    torch.manual_seed(0)
    draw: Any = {"dtype": torch.float64, "requires_grad": True}
    query, key, value = (torch.randn(total, n, width, **draw) for n in (heads, groups, groups))
    parts = []
    order = zigzag_order(batch.cu_seqlens, ranks)
    layouts = [
        context_layout(part_of(batch, rank, ranks), rotary, rank, ranks, None, packed=packed)
        for rank in range(ranks)
    ]
    turned = [turn(key[own], layout) for own, layout in zip(order, layouts, strict=True)]
    both = torch.cat((torch.cat(turned), value[order.flatten()]), 1)  # as gathered over the group
    for own, layout in zip(order, layouts, strict=True):
        attend = attend_packed if packed else attend_laid_out
        parts.append(attend(turn(query[own], layout), both, layout, SCALE)[:, 0])
    got = torch.cat(parts)[order.flatten().argsort()]

    angles = batch.position_ids[:, None] * rotary.frequencies.double()
    phases = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned_slowly(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * phases
        return torch.cat((pairs.real, pairs.imag), -1)

    q, k = turned_slowly(query), turned_slowly(key)
    spans = pairwise(batch.cu_seqlens.tolist())
    want = torch.cat([slow_attention(q[a:b], k[a:b], value[a:b]) for a, b in spans]).flatten(1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # angles in float32
    inputs, grad = (query, key, value), torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", range(3))
def test_ranks_see_equally_many_keys(rank: int) -> None:
    batch = micro_batch(3)
    rotary = Rotary(model_shape(LlamaConfig()), torch.device("cpu"), torch.float32)
    layout = context_layout(part_of(batch, rank, 3), rotary, rank, 3, None, packed=True)
    assert layout.key_rows is not None
    assert len(layout.key_rows) == batch.num_tokens + batch.num_tokens // 6
    assert (layout.max_seqlen_q, layout.max_seqlen_kv) == (7, 7 * (6 - rank))
