# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The two passes over the logits of ``logprobs`` as Triton kernels: each reads every logit once.

On a GPU the plain version is bound by memory, a pass an operation. Here a row's maximum, sum and
weighted sum are kept up to date block by block (online softmax, arXiv 1805.02867), and the gradient
is written in the same pass that recomputes the probabilities. Kernels carry no annotations but
``constexpr``, since Triton evaluates them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits a program works on at a time."""


@triton.jit
def _statistics_kernel(
    logits,
    top,
    total,
    weighted,
    stride,
    valid,
    inverse,
    with_entropy: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    highest = tl.full((), float("-inf"), tl.float32)
    mass = tl.zeros((), tl.float32)
    moment = tl.zeros((), tl.float32)
    for start in range(0, valid, block):
        columns = start + tl.arange(0, block)
        inside = columns < valid
        z = tl.load(logits + row * stride + columns, inside, float("-inf")).to(tl.float32)
        z *= inverse
        new = tl.maximum(highest, tl.max(z))
        base = tl.where(new == float("-inf"), 0.0, new)  # -inf minus -inf is not a number
        shift = tl.where(highest == float("-inf"), 0.0, highest - base)
        scale = tl.where(highest == float("-inf"), 0.0, tl.exp(shift))
        p = tl.exp(z - base)
        if with_entropy:
            below = tl.where(p > 0.0, z - base, 0.0)
            moment = scale * (moment + shift * mass) + tl.sum(p * below)
        mass = scale * mass + tl.sum(p)
        highest = new
    tl.store(top + row, highest)
    tl.store(total + row, mass)
    if with_entropy:
        tl.store(weighted + row, moment)


@triton.jit
def _gradient_kernel(
    logits,
    result,
    logsumexp,
    entropy,
    grad,
    entropy_grad,
    local,
    mine,
    stride,
    width,
    valid,
    inverse,
    has_grad: tl.constexpr,
    has_entropy_grad: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < valid
    z = tl.load(logits + row * stride + columns, inside, float("-inf")).to(tl.float32)
    log_p = z * inverse - tl.load(logsumexp + row)
    p = tl.where(inside, tl.exp(log_p), 0.0)
    slope = tl.zeros((block,), tl.float32)
    if has_grad:
        slope += tl.load(grad + row)
    if has_entropy_grad:
        below = tl.where(p > 0.0, log_p, 0.0)
        slope += tl.load(entropy_grad + row) * (below + tl.load(entropy + row))
    value = -p * slope
    if has_grad:
        hit = (columns == tl.load(local + row)) & (tl.load(mine + row) != 0)
        value += tl.where(hit, tl.load(grad + row), 0.0)
    value = (value * inverse).to(result.dtype.element_ty)
    tl.store(result + row * width + columns, value, columns < width)


def statistics(
    logits: Tensor, valid: int, inverse_temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 ``[T]`` each: highest z, sum of exp(z - highest), that sum weighted by z - highest.

    z is ``logits`` ``[T, V]`` times ``inverse_temperature``, its first ``valid`` columns; the third
    is empty without entropy. Without valid columns: -inf, 0, 0.
    """
    rows = logits.shape[0]
    top, total = logits.new_empty((2, rows), dtype=torch.float32)
    weighted = logits.new_empty(rows if with_entropy else 0, dtype=torch.float32)
    _statistics_kernel[(rows,)](
        logits,
        top,
        total,
        weighted,
        logits.stride(0),
        valid,
        inverse_temperature,
        with_entropy=with_entropy,
        block=BLOCK,
        num_warps=8,
    )
    return top, total, weighted


def gradient(
    logits: Tensor,
    local: Tensor,
    mine: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    valid: int,
    inverse_temperature: float,
    grad: Tensor | None,
    entropy_grad: Tensor | None,
) -> Tensor:
    """``[T, V]``, the logits' gradient in their dtype; 0 on the columns from ``valid`` on.

    ``grad`` and ``entropy_grad`` float32 ``[T]`` are those of log-prob and entropy; ``local``
    ``[T]`` is the label's column where ``mine`` says that this slice has it.
    """
    rows, width = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    nothing = logsumexp
    _gradient_kernel[(rows, triton.cdiv(width, BLOCK))](
        logits,
        result,
        logsumexp,
        entropy if entropy_grad is not None else nothing,
        grad.contiguous() if grad is not None else nothing,
        entropy_grad.contiguous() if entropy_grad is not None else nothing,
        local,
        mine,
        logits.stride(0),
        width,
        valid,
        inverse_temperature,
        has_grad=grad is not None,
        has_entropy_grad=entropy_grad is not None,
        block=BLOCK,
        num_warps=8,
    )
    return result
