"""Log-probability and entropy of tokens from logits that may be split over the vocabulary.

Only ``[T]`` vectors are kept for the backward pass besides the logits themselves: the softmax is
recomputed there, some rows at a time (on a GPU by kernels of their own, ``logprobs_triton``), so no
``[T, V]`` copy lives between the passes, and the gradient is the only one made.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SCRATCH_BYTES = 2**24
"""Memory for the rows worked on at a time; what fits a cache is also fastest."""


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs ``[T]`` of the labels and entropy ``[T]`` of softmax(logits / temperature).

    ``logits`` ``[T, V / tp]`` is this rank's slice of the vocabulary, rank r of ``group`` holding
    entries ``r * V / tp`` and up (``group`` None = all of it); entries from ``vocab_size`` on are
    padding and take no probability. ``labels`` int64 ``[T]`` are global token ids. Results are
    float32 (float64 for float64 logits). The entropy carries a gradient only with ``entropy_grad``.

    Example: logits ``[[0, 0]]``, label ``[1]``: log-prob ``[-0.693]``, entropy ``[0.693]``.
    """
    logprobs, entropy = _TokenLogprobs.apply(
        logits, labels, temperature, vocab_size, group, with_entropy or entropy_grad, entropy_grad
    )
    return logprobs, entropy if with_entropy or entropy_grad else None


def _all_reduce(x: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=op, group=group)
    return x


def _scaled(rows: Tensor, inverse_temperature: float, valid: int, dtype: torch.dtype) -> Tensor:
    """A fresh copy of the valid entries in ``dtype``, divided by the temperature."""
    rows = rows[:, :valid]
    if inverse_temperature == 1.0:
        return rows.to(dtype, copy=True)
    return rows.to(dtype) * inverse_temperature


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]
    """log p = z_label - logsumexp(z), entropy = logsumexp(z) - sum(p z), z = logits / temp."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float,
        vocab_size: int | None,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        width = logits.shape[1]
        offset = width * group.rank() if group is not None else 0
        valid = width if vocab_size is None else min(max(vocab_size - offset, 0), width)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        local = labels - offset
        mine = (local >= 0) & (local < valid)
        local = torch.where(mine, local, 0)

        top, total, weighted = _statistics(logits, valid, 1.0 / temperature, dtype, with_entropy)
        picked = logits.gather(1, local[:, None]).squeeze(1).to(dtype) / temperature
        picked = torch.where(mine, picked, 0.0)
        if group is not None and group.size() > 1:
            own_top, top = top, _all_reduce(top.clone(), dist.ReduceOp.MAX, group)
            scale = (own_top - top).exp()
            if with_entropy:
                shift = torch.where(total > 0, own_top - top, 0.0)
                weighted = scale * (weighted + shift * total)
                _all_reduce(weighted, dist.ReduceOp.SUM, group)
            total = _all_reduce(total * scale, dist.ReduceOp.SUM, group)
            _all_reduce(picked, dist.ReduceOp.SUM, group)
        logsumexp = top + total.log()
        entropy = total.log() - weighted / total if with_entropy else weighted

        ctx.save_for_backward(logits, local, mine, logsumexp, entropy)
        ctx.temperature, ctx.valid, ctx.entropy_grad = temperature, valid, entropy_grad
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return picked - logsumexp, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Any, ...]:
        """d log p / d z_j = [j = label] - p_j; d entropy / d z_j = -p_j (log p_j + entropy)."""
        logits, local, mine, logsumexp, entropy = ctx.saved_tensors
        result = _gradient(
            logits,
            local,
            mine,
            logsumexp,
            entropy,
            ctx.valid,
            1.0 / ctx.temperature,
            grad,
            entropy_grad,
        )
        return result, None, None, None, None, None, None


def _kernels(logits: Tensor) -> Any:
    """The module of Triton kernels where it serves these logits: on a GPU, up to float32."""
    if not logits.is_cuda or logits.dtype is torch.float64:
        return None
    from megatron_spear.algorithms import logprobs_triton

    return logprobs_triton


def _pieces(logits: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of rows, each of at most ``SCRATCH_BYTES`` as ``dtype``, or of one row."""
    num_tokens, width = logits.shape
    size = max(1, SCRATCH_BYTES // max(1, width * dtype.itemsize))
    return (slice(start, start + size) for start in range(0, num_tokens, size))


def _statistics(
    logits: Tensor, valid: int, inverse: float, dtype: torch.dtype, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``[T]`` each, over z = logits * inverse: its maximum, the sum of exp(z - maximum), and that
    sum weighted by z - maximum, so that the sums of several ranks can be shifted."""
    if kernels := _kernels(logits):
        found: tuple[Tensor, Tensor, Tensor] = kernels.statistics(
            logits, valid, inverse, with_entropy=with_entropy
        )
        return found
    num_tokens = logits.shape[0]
    top = logits.new_full((num_tokens,), -torch.inf, dtype=dtype)
    total = logits.new_zeros(num_tokens, dtype=dtype)
    weighted = logits.new_zeros(num_tokens if with_entropy else 0, dtype=dtype)
    for rows in _pieces(logits, dtype) if valid else ():
        z = _scaled(logits[rows], inverse, valid, dtype)
        top[rows] = z.amax(-1)
        z -= top[rows, None]
        p = z.exp() if with_entropy else z.exp_()
        total[rows] = p.sum(-1)
        if with_entropy:
            weighted[rows] = torch.linalg.vecdot(p, z)
    return top, total, weighted


def _gradient(
    logits: Tensor,
    local: Tensor,
    mine: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    valid: int,
    inverse: float,
    grad: Tensor | None,
    entropy_grad: Tensor | None,
) -> Tensor:
    """``[T, V / tp]``: the gradient of the logits, 0 on padding."""
    if kernels := _kernels(logits):
        found: Tensor = kernels.gradient(
            logits, local, mine, logsumexp, entropy, valid, inverse, grad, entropy_grad
        )
        return found
    result = torch.empty_like(logits)
    for rows in _pieces(logits, logsumexp.dtype):
        z = _scaled(logits[rows], inverse, valid, logsumexp.dtype)
        z -= logsumexp[rows, None]
        if entropy_grad is None:
            p = z.exp_()
            p *= grad[rows, None] * -inverse if grad is not None else 0.0
        else:
            p = z.exp()
            factor = (z + entropy[rows, None]) * entropy_grad[rows, None]
            p *= -inverse * (factor if grad is None else factor + grad[rows, None])
        result[rows, :valid] = p
    result[:, valid:] = 0.0
    if grad is not None:
        hit = (torch.where(mine, grad, 0.0) * inverse).to(result.dtype)
        result.scatter_add_(1, local[:, None], hit[:, None])
    return result
