"""Causal attention of packed sequences, one sequence after the other."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DotProductAttention(torch.nn.Module):  # type: ignore[misc]
    """Takes what Megatron passes for ``qkv_format="thd"``; anything else is refused."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0
        assert kwargs.get("cp_group") is None, "the stand-in has no context parallel attention"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """``[T, heads, D]`` each in, ``[T, heads * D]`` out."""
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert cu_seqlens_q is cu_seqlens_kv
        assert cu_seqlens_q is not None
        assert cu_seqlens_q.dtype == torch.int32
        ends: list[int] = cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        assert ends[-1] == len(query_layer) and max_seqlen_q == max_seqlen_kv == max(lengths)
        outputs = []
        for parts in zip(
            *(x.split(lengths) for x in (query_layer, key_layer, value_layer)), strict=True
        ):
            q, k, v = (part.transpose(0, 1)[None] for part in parts)
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)
