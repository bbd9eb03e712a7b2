"""Core attention for packed sequences with torch's own kernels, for where TransformerEngine is not.

Linear layers, norms and the MLP run on the packed ``[T, 1, hidden]``. In half precision on a GPU
the attention does too, by torch's flash kernel for sequences of different lengths. Elsewhere,
around the kernel, the T tokens are laid out as ``[S, L]`` (S sequences, longest L) by an index made
once per micro-batch. Sequences begin at column 0 and attention is causal, so padding to the right
is never seen by a token and no mask is needed; its own outputs are dropped. Rotary positions are
applied in the attention: to the packed tokens, cos and sin being ``[T, D]``, or to the laid-out
ones, where the position of a token is its column, cos and sin are ``[L, D]`` and are broadcast over
the sequences.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_spear.conversion.rotary import rotary_frequencies
from megatron_spear.conversion.shape import ModelShape


@dataclass
class PackedLayout(PackedSeqParams):  # type: ignore[misc]
    """Where each token goes; handed through Megatron as its ``packed_seq_params``.

    ``rows`` int64 ``[S * L]``: the token of each padded place (any token where there is none).
    ``places`` int64 ``[T]``: the padded place of each token. Both are None where the tokens stay
    packed. ``cos``, ``sin``: ``[L, 1, D / 2]``, or ``[T, 1, D / 2]`` of packed tokens.
    """

    rows: Tensor | None = None
    places: Tensor | None = None
    num_sequences: int = 0
    longest: int = 0
    cos: Tensor | None = None
    sin: Tensor | None = None


class Rotary:
    """Cosines and sines of rotary positions, as transformers computes them (float32)."""

    def __init__(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> None:
        self.frequencies = rotary_frequencies(shape).to(device)
        self.dtype = dtype
        self._cos = self._sin = torch.empty(0)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``[length, 1, D / 2]``."""
        if len(self._cos) < length:
            size = max(length, 2 * len(self._cos), 128)
            positions = torch.arange(size, dtype=torch.float32, device=self.frequencies.device)
            angles = torch.outer(positions, self.frequencies)[:, None, :]
            self._cos, self._sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return self._cos[:length], self._sin[:length]


def stays_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for sequences of different lengths: half precision, on a GPU."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def padded_index(cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """``rows`` and ``places`` of ``PackedLayout`` for one sequence a row of ``longest``."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = int(cu_seqlens[-1])
    columns = torch.arange(longest, device=cu_seqlens.device)
    rows = (starts[:, None] + torch.minimum(columns, lengths[:, None] - 1)).flatten()
    offsets = torch.arange(len(starts), device=cu_seqlens.device) * longest - starts
    places = torch.arange(total, device=cu_seqlens.device)
    return rows, places + torch.repeat_interleave(offsets, lengths, output_size=total)


def packed_layout(
    cu_seqlens: Tensor, max_seqlen: int, rotary: Rotary, *, packed: bool = False
) -> PackedLayout:
    """The layout of one micro-batch, shared by all layers. ``cu_seqlens`` int32 ``[S + 1]``."""
    cos, sin = rotary.tables(max_seqlen)
    rows = places = None
    if packed:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        total = int(cu_seqlens[-1])
        positions = torch.arange(total, device=cu_seqlens.device)
        positions = positions - torch.repeat_interleave(starts, lengths, output_size=total)
        cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
    else:
        rows, places = padded_index(cu_seqlens, max_seqlen)
    return PackedLayout(
        qkv_format="sbhd",  # Megatron itself then takes its plain path
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        rows=rows,
        places=places,
        num_sequences=len(cu_seqlens) - 1,
        longest=max_seqlen,
        cos=cos,
        sin=sin,
    )


class PackedAttention(torch.nn.Module):  # type: ignore[misc]
    """Megatron's core-attention interface: queries, keys, values ``[T, 1, heads, D]`` in,
    ``[T, 1, heads * D]`` out."""

    def __init__(
        self, config: Any, layer_number: int, *args: Any, softmax_scale: Any = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

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
        assert isinstance(layout, PackedLayout), "the policy hands every batch with its layout"
        if layout.rows is None:
            return self._packed(query.squeeze(1), key.squeeze(1), value.squeeze(1), layout)
        q = Lay.apply(query.squeeze(1), layout, True)
        k = Lay.apply(key.squeeze(1), layout, True)
        v = Lay.apply(value.squeeze(1), layout, False)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return Gather.apply(out.transpose(1, 2), layout)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
        """``[T, heads, D]`` each in, ``[T, 1, heads * D]`` out."""
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            turn(query, layout),
            turn(key, layout),
            value,
            layout.cu_seqlens_q,
            layout.cu_seqlens_kv,
            layout.longest,
            layout.longest,
            scale=self.softmax_scale,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.flatten(1).unsqueeze(1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing is stored."""
        return {}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> Tensor:
    """``x`` ``[..., H, D]`` turned by the angles of its column or token; ``backwards`` turns the
    other way."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sign = -1 if backwards else 1
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


def turn(x: Tensor, layout: PackedLayout) -> Tensor:
    """Packed ``[T, H, D]`` turned by the tokens' angles."""
    return _Turn.apply(x, layout)


class _Turn(torch.autograd.Function):  # type: ignore[misc]
    """``turn`` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return _rotate(x, layout.cos, layout.sin, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rotate(grad, ctx.layout.cos, ctx.layout.sin, True), None


class Lay(torch.autograd.Function):  # type: ignore[misc]
    """Packed ``[T, H, D]`` to padded ``[S, L, H, D]``, rotated on request.

    Padding repeats a token and receives a zero gradient (nothing sees it), so the way back is a
    plain gather too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PackedLayout, rotate: bool) -> Tensor:
        ctx.layout, ctx.rotate = layout, rotate
        heads = x.shape[1:]
        padded = x.index_select(0, layout.rows).view(layout.num_sequences, layout.longest, *heads)
        return _rotate(padded, layout.cos, layout.sin, False) if rotate else padded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        layout = ctx.layout
        if ctx.rotate:
            grad = _rotate(grad, layout.cos, layout.sin, True)
        flat = grad.reshape(-1, *grad.shape[2:])
        return flat.index_select(0, layout.places), None, None


class Gather(torch.autograd.Function):  # type: ignore[misc]
    """Padded ``[S, L, H, D]`` back to packed ``[T, 1, H * D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout, ctx.shape = layout, x.shape
        flat = x.reshape(layout.num_sequences * layout.longest, -1)
        return flat.index_select(0, layout.places).unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.squeeze(1)
        padded = grad.new_zeros(math.prod(ctx.shape[:2]), grad.shape[1])
        padded.index_copy_(0, ctx.layout.places, grad)
        return padded.view(ctx.shape), None
