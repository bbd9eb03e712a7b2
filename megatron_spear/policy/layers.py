"""Norm and gated MLP for the layers without TransformerEngine: few passes over memory.

On a CPU these layers are bound by memory, and torch takes a pass per arithmetic operation; writing
their derivatives by hand saves most of them. Megatron's own modules stay around them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class RMSNorm(torch.nn.Module):  # type: ignore[misc]
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in float32 for half inputs.

    Under sequence parallelism its weight's gradient is summed over the tensor-parallel group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return _RmsNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """With n = x * r, r = 1 / rms: dx = r (w g - n mean(n w g)); dw = sum(n g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        normed = x * inverse
        product = grad * normed
        mean = torch.matmul(product, weight).unsqueeze_(-1).div_(width)
        grad_weight = product.view(-1, width).sum(0)
        grad_x = torch.mul(grad, weight, out=product)
        grad_x.addcmul_(normed, mean, value=-1).mul_(inverse)
        return grad_x, grad_weight, None


class GatedMlp(MLP):  # type: ignore[misc]
    """Megatron's MLP with ``silu(gate) * up`` as one operation.

    ``adopt`` turns a plain MLP into this class after it was built: Megatron decides what a layer
    hands its MLP by the exact class in the layer spec.
    """

    @classmethod
    def adopt(cls, mlp: MLP) -> None:
        assert type(mlp) is MLP and mlp.config.gated_linear_unit, "a plain gated MLP is expected"
        mlp.__class__ = cls

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """``per_token_scale`` ``[T]`` weights the output of an expert."""
        both, _ = self.linear_fc1(hidden_states)
        inner = _SiluGate.apply(both)
        if per_token_scale is not None:
            inner = (inner * per_token_scale.unsqueeze(-1)).to(inner.dtype)
        output, bias = self.linear_fc2(inner)
        return output, bias


class _SiluGate(torch.autograd.Function):  # type: ignore[misc]
    """``silu(x[..., :n]) * x[..., n:]``; keeps only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        half = gate.shape[-1]
        torch.mul(grad, F.silu(gate), out=out[..., half:])
        out[..., :half] = torch.ops.aten.silu_backward(grad * up, gate)
        return out
