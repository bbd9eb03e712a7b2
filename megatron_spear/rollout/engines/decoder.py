"""Forward pass of a Llama-kind decoder over a slot cache: prefill of prompts, one-token decode.

An MLP may be a mixture of experts.

Plain tensor functions over fused weights instead of modules: at a batch of 32 and a few million
parameters, module and cache bookkeeping costs as much as the arithmetic. Linear layers run over
packed tokens ``[N, H]`` (no padding); only attention sees the batch as slots.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from megatron_spear.conversion.rotary import rotary_frequencies
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.rollout.engines.decoder_weights import DecoderWeights, LayerWeights
from megatron_spear.rollout.engines.kv_cache import KVCache
from megatron_spear.types import FloatArray, TokenArray

# Attention takes rotated queries [N, heads, D] and one layer's [2, slots, kv_heads, C, D].
Attention = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Below this share of live slots in a range, gathering their keys costs less than reading them all.
_DENSE_FRACTION = 0.6
# Logits held at a time when a prompt is scored.
_SCORED_ROWS = 256


class Decoder:
    """A functional decoder: ``weights`` by Hugging Face name, tables of rotary angles."""

    def __init__(self, weights: DecoderWeights, max_context: int) -> None:
        self.weights = weights
        self.shape = weights.shape
        self.cos, self.sin = _rope_tables(self.shape, max_context, weights.dtype)

    def decode(self, cache: KVCache, slots: np.ndarray, tokens: np.ndarray) -> torch.Tensor:
        """Logits ``[B, V]`` after one further token a slot.

        ``slots`` int64 ``[B]`` ascending, ``tokens`` int64 ``[B]``. Keys and values are written at
        each slot's ``length``; noting the tokens in the cache is the caller's part.
        """
        positions = cache.length[slots]
        with torch.inference_mode():
            x = self._run(
                cache,
                torch.from_numpy(tokens),
                torch.from_numpy(slots),
                torch.from_numpy(positions),
                self._one_token_attention(slots, positions + 1),
            )
            return self.weights.head(x)

    def prefill(
        self, cache: KVCache, slots: np.ndarray, new_tokens: Sequence[TokenArray]
    ) -> torch.Tensor:
        """Logits ``[B, V]`` after the last of each slot's new tokens (at least one a slot).

        ``slots`` int64 ``[B]``. As in ``decode``, keys and values are written from ``length`` on.
        """
        starts = cache.length[slots]
        sizes = np.array([len(t) for t in new_tokens])
        offsets = np.concatenate([np.arange(size) for size in sizes])
        owner = np.repeat(np.arange(len(slots)), sizes)
        last = np.cumsum(sizes) - 1
        with torch.inference_mode():
            x = self._run(
                cache,
                torch.from_numpy(np.concatenate(new_tokens).astype(np.int64)),
                torch.from_numpy(slots[owner]),
                torch.from_numpy(starts[owner] + offsets),
                self._block_attention(slots, starts, sizes, owner, offsets),
                (torch.from_numpy(last), self._one_token_attention(slots, starts + sizes)),
            )
            return self.weights.head(x)

    def score(self, token_ids: TokenArray) -> FloatArray:
        """float32 ``[P]``: the log-prob of each token after those before it, 0 for the first.

        Nothing of it is kept: keys and values of this one context and ``_SCORED_ROWS`` rows of
        logits are held meanwhile.
        """
        size, s = len(token_ids), self.shape
        cache = KVCache(
            layers=s.num_layers,
            slots=1,
            kv_heads=s.num_groups,
            max_context=size,
            head_dim=s.head_dim,
            dtype=self.weights.dtype,
        )
        zeros, places = np.zeros(size, np.int64), np.arange(size)
        tokens = torch.from_numpy(token_ids.astype(np.int64))
        logprobs = torch.zeros(size)
        with torch.inference_mode():
            attend = self._block_attention(
                zeros[:1], zeros[:1], np.array([size]), owner=zeros, offsets=places
            )
            x = self._run(cache, tokens, torch.from_numpy(zeros), torch.from_numpy(places), attend)
            for start in range(0, size - 1, _SCORED_ROWS):
                stop = min(start + _SCORED_ROWS, size - 1)
                logits = self.weights.head(x[start:stop]).float()
                picked = logits.gather(1, tokens[start + 1 : stop + 1, None])[:, 0]
                logprobs[start + 1 : stop + 1] = picked - logits.logsumexp(-1)
        scored: FloatArray = logprobs.numpy()
        return scored

    def _run(
        self,
        cache: KVCache,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        attend: Attention,
        last: tuple[torch.Tensor, Attention] | None = None,
    ) -> torch.Tensor:
        """Final hidden states of packed tokens; only those of ``last`` where it is given.

        The last layer's keys and values are needed for all tokens, its rest only for ``last``.
        """
        s = self.shape
        x = F.embedding(tokens, self.weights.embedding)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        heads = torch.arange(s.num_groups)
        _, _, _, _, max_context, head_dim = cache.storage.shape
        cells = (slots[:, None] * s.num_groups + heads) * max_context + positions[:, None]
        cells = cells.flatten()
        for i, layer in enumerate(self.weights.layers):
            normed = F.rms_norm(x, (s.hidden_size,), layer.input_norm, s.norm_eps)
            queries, keys, values = self._project(layer, normed, cos, sin)
            stored = cache.storage[i]
            stored[0].view(-1, head_dim).index_copy_(0, cells, keys.reshape(-1, head_dim))
            stored[1].view(-1, head_dim).index_copy_(0, cells, values.reshape(-1, head_dim))
            if last is not None and i == s.num_layers - 1:
                rows, attend = last
                x, queries = x[rows], queries[rows]
            x = layer.output.add_to(x, attend(queries, stored))
            normed = F.rms_norm(x, (s.hidden_size,), layer.mlp_norm, s.norm_eps)
            if layer.router is None:
                ((gate_up, down),) = layer.mlps
                x = down.add_to(x, _gated(gate_up(normed)))
            else:
                x = x + self._mixture(layer, layer.router, normed)
        return F.rms_norm(x, (s.hidden_size,), self.weights.final_norm, s.norm_eps)

    def _project(
        self, layer: LayerWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries ``[N, heads, D]``, rotated keys and values ``[N, kv_heads, D]``."""
        s = self.shape
        split = s.num_heads + s.num_groups
        qkv = layer.qkv(x).view(len(x), -1, s.head_dim)
        qk = qkv[:, :split]
        if layer.qk_scale is not None:
            qk = F.rms_norm(qk, (s.head_dim,), None, s.norm_eps) * layer.qk_scale
        half = s.head_dim // 2
        turned = qk * cos
        turned[..., :half].addcmul_(qk[..., half:], sin, value=-1)
        turned[..., half:].addcmul_(qk[..., :half], sin)
        return turned[:, : s.num_heads], turned[:, s.num_heads :], qkv[:, split:]

    def _mixture(self, layer: LayerWeights, router: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the chosen experts make of ``x`` ``[N, H]``, weighted; routed in fp32 as the policy.

        One expert after the other, with the tokens that chose it.
        """
        probabilities = F.linear(x.float(), router.float()).softmax(-1)
        weights, chosen = probabilities.topk(self.shape.experts_per_token, -1)
        if self.shape.normalize_routing:
            weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, places = torch.where(chosen == expert)
            gate_up, down = layer.mlps[expert]
            inner = _gated(gate_up(x[rows])) * weights[rows, places, None]
            mixed.index_add_(0, rows, down(inner.to(x.dtype)))
        return mixed

    def _one_token_attention(self, slots: np.ndarray, lengths: np.ndarray) -> Attention:
        """One query a slot over its first ``lengths`` positions: ``[B, heads * D]``."""
        s = self.shape
        low, high, longest = int(slots.min()), int(slots.max()) + 1, int(lengths.max())
        size = high - low
        ascending = bool((np.diff(slots) > 0).all())
        dense = ascending and len(slots) >= _DENSE_FRACTION * size
        rows = torch.from_numpy(slots - low if dense else slots)
        whole = dense and len(slots) == size
        batch = size if dense else len(slots)
        limits = torch.full((batch,), longest)
        limits[rows if dense else slice(None)] = torch.from_numpy(lengths)
        hidden = torch.arange(longest) >= limits[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.weights.dtype)
        mask = mask.masked_fill_(hidden, -torch.inf).repeat_interleave(s.num_groups, 0)[:, None]
        group, scale = s.num_heads // s.num_groups, s.head_dim**-0.5

        def attend(queries: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
            if dense:
                keys, values = stored[:, low:high].flatten(1, 2)[:, :, :longest]
            else:
                keys, values = stored[:, rows, :, :longest].flatten(1, 2)
            if dense and not whole:
                spread = queries.new_zeros(size, s.num_heads, s.head_dim)
                queries = spread.index_copy_(0, rows, queries)
            queries = queries.reshape(batch * s.num_groups, group, s.head_dim)
            scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scale)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
            mixed = torch.bmm(weights, values).view(batch, -1)
            return mixed[rows] if dense and not whole else mixed

        return attend

    def _block_attention(
        self,
        slots: np.ndarray,
        starts: np.ndarray,
        sizes: np.ndarray,
        owner: np.ndarray,
        offsets: np.ndarray,
    ) -> Attention:
        """Causal attention of new tokens, packed ``[N, heads, D]``: ``[N, heads * D]``.

        Queries are padded to ``[B, heads, T, D]`` for the attention only.
        """
        s = self.shape
        block, longest = int(sizes.max()), int((starts + sizes).max())
        cells = torch.from_numpy(owner * block + offsets)
        low, high = int(slots[0]), int(slots[0]) + len(slots)
        in_a_row = bool((slots == np.arange(low, high)).all())
        rows = torch.from_numpy(slots)
        fresh = not starts.any()
        mask = None
        if not fresh:
            seen = torch.from_numpy(starts)[:, None] + torch.arange(block) + 1
            hidden = torch.arange(longest) >= seen[:, :, None]
            mask = torch.zeros(hidden.shape, dtype=self.weights.dtype)
            mask = mask.masked_fill_(hidden, -torch.inf)[:, None]

        def attend(queries: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
            picked = stored[:, low:high] if in_a_row else stored[:, rows]
            keys, values = picked[:, :, :, :longest]
            padded = queries.new_zeros(len(slots) * block, s.num_heads, s.head_dim)
            padded = padded.index_copy_(0, cells, queries).view(len(slots), block, -1, s.head_dim)
            mixed = F.scaled_dot_product_attention(
                padded.transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                is_causal=fresh,
                enable_gqa=s.num_heads != s.num_groups,
            )
            return mixed.transpose(1, 2).reshape(len(slots) * block, -1)[cells]

        return attend


def _gated(both: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` ``[N, F]`` of the two side by side."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _rope_tables(
    shape: ModelShape, max_context: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines ``[C, D]`` and sines ``[C, D / 2]`` of the rotary angles, as in transformers."""
    positions = torch.arange(max_context, dtype=torch.float32)
    angles = positions[:, None] * rotary_frequencies(shape)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), sin.to(dtype)
