"""Which tokens covariance singles out: those that lose their gradient, those that pay a KL penalty.

A token's covariance is (logprob - mean logprob) * (advantage - mean advantage).
- Clip-Cov (SPEAR Eq. 18-21, after arXiv 2505.22617): tokens drawn from a band of covariance are
  dropped (``dropped_tokens``); the caller gives them weight 0.
- KL-Cov (arXiv 2505.22617): the tokens of highest covariance are selected (``kl_selected_tokens``);
  ``surrogates.KlCov`` penalises them.
What differs from the official code: the means and the quota are those of the whole update, not of a
micro-batch, and draws are keyed by (seed, step, trajectory, segment, token), so no split or layout
changes which tokens are chosen. Only the choice is made here.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.draws import raw_draws
from megatron_spear.config.losses import ClipCovLossSection
from megatron_spear.types import BoolArray, TrainSample

MAX_LOG_RATIO = 20.0

_Values = npt.NDArray[np.float64]
_AnyFloats = npt.NDArray[np.floating]


def dropped_tokens(
    samples: Sequence[TrainSample],
    logprobs: Sequence[_AnyFloats],
    section: ClipCovLossSection,
    *,
    clip_low: float,
    clip_high: float,
    seed: int,
    step: int,
) -> list[BoolArray]:
    """bool ``[L]`` for each sample: True on the tokens whose gradient is dropped.

    ``samples`` are all of one update, ``logprobs`` ``[L]`` each their log-probs under the current
    policy. Eligible are masked tokens with ``low < covariance < high`` that the ratio clip has not
    silenced already; of these ``drop_quota`` many are drawn uniformly.
    """
    if not samples:
        return []
    flat_logprobs, flat_advantages, flat_mask = _flat(samples, logprobs)
    flat_old = _joined([sample.old_logprobs for sample in samples])
    candidates = eligible(
        covariances(flat_logprobs, flat_advantages, flat_mask),
        ratio_clipped(flat_logprobs, flat_old, flat_advantages, clip_low, clip_high),
        flat_mask,
        section,
    )
    quota = drop_quota(section.fraction, int(flat_mask.sum()), int(candidates.sum()))
    draws = np.concatenate(
        [raw_draws(len(s.token_ids), seed, step, str(s.trajectory_id), s.segment) for s in samples]
    )
    indices = np.flatnonzero(candidates)
    chosen = indices[np.argsort(draws[indices], kind="stable")[:quota]]
    return _flags(samples, chosen)


def kl_selected_tokens(
    samples: Sequence[TrainSample],
    logprobs: Sequence[_AnyFloats],
    *,
    fraction: float,
    seed: int,
    step: int,
) -> list[BoolArray]:
    """bool ``[L]`` for each sample: True on the tokens of highest covariance (KL-Cov).

    ``samples`` are all of one update, ``logprobs`` ``[L]`` each their log-probs under the current
    policy. floor(fraction * masked tokens) are selected, at least 1 (none with fraction 0); a draw
    decides between tokens of equal covariance.
    """
    if not samples:
        return []
    flat_logprobs, flat_advantages, flat_mask = _flat(samples, logprobs)
    covariance = covariances(flat_logprobs, flat_advantages, flat_mask)
    draws = np.concatenate(
        [
            raw_draws(len(s.token_ids), seed, step, "kl-cov", str(s.trajectory_id), s.segment)
            for s in samples
        ]
    )
    indices = np.flatnonzero(flat_mask)
    quota = drop_quota(fraction, len(indices), len(indices))
    order = np.lexsort((draws[indices], -covariance[indices]))
    return _flags(samples, indices[order[:quota]])


def covariances(logprobs: _AnyFloats, advantages: _AnyFloats, mask: BoolArray) -> _Values:
    """float64 ``[T]``: (logprob - mean) * (advantage - mean), means over the masked tokens.

    The sums are exactly rounded, so they do not depend on the order of the tokens.
    """
    count = max(int(mask.sum()), 1)
    mean_logprob = math.fsum(logprobs[mask].tolist()) / count
    mean_advantage = math.fsum(advantages[mask].tolist()) / count
    product: _Values = (logprobs - mean_logprob) * (advantages - mean_advantage)
    return product.astype(np.float64)


def ratio_clipped(
    logprobs: _AnyFloats,
    old_logprobs: _AnyFloats,
    advantages: _AnyFloats,
    clip_low: float,
    clip_high: float,
) -> BoolArray:
    """bool ``[T]``: True where the clipped surrogate is the larger loss, so the gradient is 0."""
    ratio = np.exp(np.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = np.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    result: BoolArray = -advantages * clipped > -advantages * ratio
    return result


def eligible(
    covariance: _AnyFloats, clipped: BoolArray, mask: BoolArray, section: ClipCovLossSection
) -> BoolArray:
    """bool ``[T]``: masked, not ratio-clipped, and strictly inside the covariance band."""
    inside: BoolArray = (covariance > section.low) & (covariance < section.high)
    return inside & mask & ~clipped


def drop_quota(fraction: float, num_tokens: int, num_eligible: int) -> int:
    """How many tokens are dropped: floor(fraction * tokens), at least 1, at most the eligible.

    A fraction of 0 switches the drop off. Example: 0.02 of 120 tokens is 2; of 30 tokens it is 1.
    """
    if fraction == 0.0:
        return 0
    return min(max(math.floor(fraction * num_tokens), 1), num_eligible)


def dropped_fraction(samples: Sequence[TrainSample], dropped: Sequence[BoolArray]) -> float:
    """Share of the masked tokens that were dropped (metric ``replay/cov_dropped_fraction``)."""
    num_tokens = sum(int(sample.response_mask.sum()) for sample in samples)
    return sum(int(row.sum()) for row in dropped) / max(num_tokens, 1)


def _flat(
    samples: Sequence[TrainSample], logprobs: Sequence[_AnyFloats]
) -> tuple[_Values, _Values, BoolArray]:
    """Log-probs, advantages and masks of all samples, each as one array."""
    flat_logprobs = _joined(logprobs)
    flat_advantages = _joined([sample.advantages for sample in samples])
    flat_mask = np.concatenate([sample.response_mask for sample in samples])
    assert len(flat_logprobs) == len(flat_mask), "one log-prob per token of every sample"
    return flat_logprobs, flat_advantages, flat_mask


def _flags(samples: Sequence[TrainSample], chosen: npt.NDArray[np.integer]) -> list[BoolArray]:
    """bool ``[L]`` for each sample from indices into the samples laid end to end."""
    lengths = [len(sample.token_ids) for sample in samples]
    flags = np.zeros(sum(lengths), np.bool_)
    flags[chosen] = True
    return np.split(flags, np.cumsum(lengths)[:-1])


def _joined(rows: Sequence[_AnyFloats]) -> _Values:
    return np.concatenate(rows).astype(np.float64)
