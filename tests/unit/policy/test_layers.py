"""Hand-written derivatives and the packed attention against plain torch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_spear.conversion.shape import model_shape
from megatron_spear.policy.attention import PackedAttention, Rotary, packed_layout
from megatron_spear.policy.layers import RMSNorm, _SiluGate

LENGTHS = [5, 3, 1, 7]


def config_of(**changes: object) -> LlamaConfig:
    values = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**values | changes)


def test_rms_norm_gradients() -> None:
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 16, 1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x, grad = torch.randn(3, 2, 16, requires_grad=True), torch.randn(3, 2, 16)
    want = F.rms_norm(x, (16,), norm.weight, 1e-6)
    torch.testing.assert_close(norm(x), want)
    got_grads = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    want_grads = torch.autograd.grad(want, (x, norm.weight), grad)
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_silu_gate_gradients() -> None:
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(_SiluGate.apply(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(_SiluGate.apply, (x,))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, rotary: LlamaRotaryEmbedding) -> Tensor:
    """Sequence by sequence, with transformers' own rotary positions."""
    outputs = []
    for q_, k_, v_ in zip(*(x.squeeze(1).split(LENGTHS) for x in (q, k, v)), strict=True):
        q_, k_, v_ = (x.transpose(0, 1)[None] for x in (q_, k_, v_))
        cos, sin = rotary(q_, torch.arange(q_.shape[2])[None])
        q_, k_ = apply_rotary_pos_emb(q_, k_, cos, sin)
        out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)[:, None]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_packed_attention(rope: dict) -> None:
    config = config_of(rope_parameters=rope)
    rotary = Rotary(model_shape(config), torch.device("cpu"), torch.float32)
    seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    layout = packed_layout(seqlens, max(LENGTHS), rotary)
    total = sum(LENGTHS)
    q, k, v = (torch.randn(total, 1, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    grad = torch.randn(total, 1, 32)
    got = PackedAttention(None, 1)(q, k, v, None, packed_seq_params=layout)
    want = plain_attention(q, k, v, LlamaRotaryEmbedding(config))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), grad),
        torch.autograd.grad(want, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
