"""The official code's policy losses over one padded micro-batch.

Tensors are ``[B, T]`` (mask 1.0 on trained tokens), each loss is a scalar that autograd
differentiates. These serve ``algorithm.compat: official``. Per-token formulas are those of
``surrogates``; what differs is around them: statistics, quotas and
normalisation are the micro-batch's (``official.masked``), and only ``vanilla`` clamps the log
ratio.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_spear.algorithms.official.masked import aggregate, masked_mean
from megatron_spear.algorithms.surrogates import (
    MAX_LOG_RATIO,
    clipped_surrogate,
    gpg_surrogate,
    kl_cov_surrogate,
)

Permutation = Callable[[int], Tensor]
"""From a count n to a permutation of 0..n-1."""


@dataclass(frozen=True, kw_only=True)
class OfficialLoss:
    """A loss and what the official code reports with it, all scalars."""

    loss: Tensor
    clip_fraction: Tensor
    kl: Tensor
    dual_clip_fraction: Tensor


@dataclass(frozen=True, kw_only=True)
class OfficialClip:
    """Knobs of ``clip_cov``: ratio bounds, share of tokens dropped, covariance band."""

    clip_low: float
    clip_high: float
    fraction: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class CovarianceDrop:
    """Which tokens a micro-batch drops: ``covariance`` ``[B, T]`` (-inf where never dropped),
    ``eligible`` ``[E, 2]`` and ``dropped`` ``[D, 2]`` as (row, column), ``quota`` before the
    eligible limit it."""

    covariance: Tensor
    eligible: Tensor
    dropped: Tensor
    quota: int


def vanilla(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    aggregation: str,
) -> OfficialLoss:
    """Clipped surrogate with a dual clip; the log ratio is clamped to +-20."""
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    surrogate, clipped, dual_clipped = clipped_surrogate(
        log_ratio.exp(), advantages, clip_low, clip_high, dual_clip
    )
    return OfficialLoss(
        loss=aggregate(surrogate, mask, aggregation),
        clip_fraction=masked_mean(clipped.to(mask.dtype), mask),
        kl=masked_mean(-log_ratio.detach(), mask),
        dual_clip_fraction=masked_mean(dual_clipped.to(mask.dtype), mask),
    )


def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: OfficialClip,
    *,
    aggregation: str,
    permutation: Tensor | None = None,
) -> tuple[OfficialLoss, CovarianceDrop]:
    """Clipped surrogate without clamp or dual clip; tokens drawn by covariance are dropped.

    ``permutation`` int64 ``[E]`` is the draw, an order of the eligible tokens in row-major order;
    None draws it from torch's global generator. The clip fraction counts dropped tokens only.
    """
    log_ratio = logprobs - old_logprobs
    surrogate, clipped, _ = clipped_surrogate(
        log_ratio.exp(), advantages, clip.clip_low, clip.clip_high, None
    )
    drop = covariance_drop(logprobs.detach(), advantages, mask, clipped, clip, permutation)
    kept = torch.ones_like(mask)
    kept[drop.dropped[:, 0], drop.dropped[:, 1]] = 0.0
    result = OfficialLoss(
        loss=aggregate(surrogate * kept, mask, aggregation),
        clip_fraction=masked_mean(1.0 - kept, mask),
        kl=masked_mean(-log_ratio.detach(), mask),
        dual_clip_fraction=mask.new_zeros(()),
    )
    return result, drop


def covariance_drop(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clipped: Tensor,
    clip: OfficialClip,
    permutation: Tensor | Permutation | None,
) -> CovarianceDrop:
    """Tokens dropped: the first of the permuted eligible, max(floor(fraction * tokens), 1) many.

    ``permutation`` is the draw, or makes one of a given length; None draws from torch's global
    generator. Eligible are masked tokens that the ratio clip has not silenced, strictly inside the
    band.
    """
    centred_logprobs = logprobs - masked_mean(logprobs, mask)
    covariance = (advantages - masked_mean(advantages, mask)) * centred_logprobs
    covariance = covariance.masked_fill(clipped | (mask == 0), -torch.inf)
    eligible = ((covariance > clip.low) & (covariance < clip.high)).nonzero()
    quota = max(math.floor(clip.fraction * mask.sum().item()), 1)
    if permutation is None:
        order = torch.randperm(len(eligible), device=mask.device)
    else:
        order = permutation if isinstance(permutation, Tensor) else permutation(len(eligible))
    assert len(order) == len(eligible), "one place in the draw for each eligible token"
    dropped = eligible[order[:quota]]
    return CovarianceDrop(covariance=covariance, eligible=eligible, dropped=dropped, quota=quota)


def kl_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    fraction: float,
    coef: float,
    aggregation: str,
) -> OfficialLoss:
    """Unclipped surrogate; the tokens of highest covariance pay coef * abs(log ratio).

    ``kl`` of the result is the mean absolute log ratio.
    """
    log_ratio = logprobs - old_logprobs
    selected = kl_cov_selected(logprobs.detach(), advantages, mask, fraction)
    surrogate = kl_cov_surrogate(log_ratio, advantages, selected, coef)
    return OfficialLoss(
        loss=aggregate(surrogate, mask, aggregation),
        clip_fraction=mask.new_zeros(()),
        kl=masked_mean(log_ratio.detach().abs(), mask),
        dual_clip_fraction=mask.new_zeros(()),
    )


def kl_cov_selected(logprobs: Tensor, advantages: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """bool ``[B, T]``: the max(floor(fraction * tokens), 1) masked tokens of highest covariance;
    none with a fraction of 0."""
    selected = torch.zeros_like(mask, dtype=torch.bool)
    trained = mask > 0
    num_tokens = int(trained.sum())
    if num_tokens and fraction > 0:
        own_logprobs, own_advantages = logprobs[trained], advantages[trained]
        covariance = (own_advantages - own_advantages.mean()) * (own_logprobs - own_logprobs.mean())
        quota = max(math.floor(fraction * num_tokens), 1)
        rows = trained.nonzero()[covariance.topk(quota).indices]
        selected[rows[:, 0], rows[:, 1]] = True
    return selected


def gpg(logprobs: Tensor, advantages: Tensor, mask: Tensor, *, aggregation: str) -> OfficialLoss:
    """Plain policy gradient; its metrics are always 0."""
    zero = mask.new_zeros(())
    loss = aggregate(gpg_surrogate(logprobs, advantages), mask, aggregation)
    return OfficialLoss(loss=loss, clip_fraction=zero, kl=zero, dual_clip_fraction=zero)
