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
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.draws import smallest
from megatron_spear.algorithms.masked_blocks import (
    Indices,
    MaskedBlock,
    masked_blocks,
    token_draws,
)
from megatron_spear.algorithms.order_free_sum import order_free_sum
from megatron_spear.config.losses import ClipCovLossSection
from megatron_spear.types import BoolArray, TrainSample

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
    blocks = masked_blocks(samples, logprobs)
    means = masked_means(blocks)
    found = []
    for block in blocks:
        band = in_band(covariances(block.logprobs, block.advantages, means), section)
        positions = block.positions(band)
        clipped = ratio_clipped(
            block.logprobs[band],
            np.concatenate([s.old_logprobs for s in block.samples])[positions - block.start],
            block.advantages[band],
            clip_low,
            clip_high,
        )
        found.append(positions[~clipped])
    eligible = np.concatenate(found)
    num_tokens = sum(len(block.logprobs) for block in blocks)
    quota = drop_quota(section.fraction, num_tokens, len(eligible))
    draws = token_draws(samples, eligible, seed, step)
    return _flags(samples, eligible[smallest(draws, quota)])


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
    blocks = masked_blocks(samples, logprobs)
    means = masked_means(blocks)
    found = [covariances(block.logprobs, block.advantages, means) for block in blocks]
    found = [np.fmax(values, -np.inf) for values in found]  # what is not a number comes last
    count = sum(map(len, found))
    quota = drop_quota(fraction, count, count)
    if not quota:
        return _flags(samples, np.zeros(0, np.intp))
    least = np.partition(np.concatenate(found), count - quota)[count - quota]
    pairs = list(zip(blocks, found, strict=True))
    above = np.concatenate([block.positions(values > least) for block, values in pairs])
    equal = np.concatenate([block.positions(values == least) for block, values in pairs])
    draws = token_draws(samples, equal, seed, step, "kl-cov")
    chosen = equal[smallest(draws, quota - len(above))]
    return _flags(samples, np.concatenate([above, chosen]))


def masked_means(blocks: Sequence[MaskedBlock]) -> tuple[float, float]:
    """(mean log-prob, mean advantage) over the masked tokens of all blocks, which do not depend on
    the order of the samples or on the blocks (``order_free_sum``)."""
    count = max(sum(len(block.logprobs) for block in blocks), 1)
    return (
        order_free_sum([block.logprobs for block in blocks]) / count,
        order_free_sum([block.advantages for block in blocks]) / count,
    )


def covariances(
    logprobs: _AnyFloats, advantages: _AnyFloats, means: tuple[float, float]
) -> _AnyFloats:
    """``[M]``, in the inputs' dtype: (logprob - mean) * (advantage - mean) of masked tokens."""
    product: _AnyFloats = logprobs - means[0]
    product *= advantages - means[1]
    return product


def in_band(covariance: _AnyFloats, section: ClipCovLossSection) -> Indices:
    """Indices of the covariances strictly inside the band; nan is outside."""
    above = np.flatnonzero(covariance > section.low)
    return above[covariance[above] < section.high]


def ratio_clipped(
    logprobs: _AnyFloats,
    old_logprobs: _AnyFloats,
    advantages: _AnyFloats,
    clip_low: float,
    clip_high: float,
) -> BoolArray:
    """bool ``[M]``: True where the clipped surrogate is the larger loss, so the gradient is 0.

    That is a ratio above 1 + clip_high with a positive advantage, or below 1 - clip_low with a
    negative one; as logarithms, which do not overflow.
    """
    log_ratio = logprobs - old_logprobs
    above: BoolArray = (advantages > 0) & (log_ratio > math.log(1.0 + clip_high))
    below: BoolArray = (advantages < 0) & (log_ratio < math.log(1.0 - clip_low))
    return above | below


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


def _flags(samples: Sequence[TrainSample], chosen: Indices) -> list[BoolArray]:
    """bool ``[L]`` for each sample from positions with the samples laid end to end."""
    ends = list(accumulate(len(sample.token_ids) for sample in samples))
    flags = np.zeros(ends[-1], np.bool_)
    flags[chosen] = True
    return [flags[start:end] for start, end in pairwise([0, *ends])]
