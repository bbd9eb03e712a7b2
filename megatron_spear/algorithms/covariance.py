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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.draws import DrawArray, smallest, stream_draws, stream_key
from megatron_spear.algorithms.order_free_sum import order_free_sum
from megatron_spear.config.losses import ClipCovLossSection
from megatron_spear.types import BoolArray, TrainSample

_Values = npt.NDArray[np.float64]
_AnyFloats = npt.NDArray[np.floating]
_Indices = npt.NDArray[np.intp]


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
    masked = _Masked.of(samples, logprobs)
    band = in_band(covariances(masked.logprobs, masked.advantages), section)
    old_logprobs = np.concatenate([s.old_logprobs for s in samples])[masked.positions[band]]
    clipped = ratio_clipped(
        masked.logprobs[band], old_logprobs, masked.advantages[band], clip_low, clip_high
    )
    eligible = masked.positions[band[~clipped]]
    quota = drop_quota(section.fraction, len(masked.positions), len(eligible))
    draws = _draws(samples, eligible, seed, step)
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
    masked = _Masked.of(samples, logprobs)
    count = len(masked.positions)
    quota = drop_quota(fraction, count, count)
    if not quota:
        return _flags(samples, masked.positions[:0])
    found = covariances(masked.logprobs, masked.advantages)
    found = np.fmax(found, -np.inf)  # what is not a number comes last
    least = np.partition(found, count - quota)[count - quota]
    above, equal = masked.positions[found > least], masked.positions[found == least]
    draws = _draws(samples, equal, seed, step, "kl-cov")
    chosen = equal[smallest(draws, quota - len(above))]
    return _flags(samples, np.concatenate([above, chosen]))


def covariances(logprobs: _AnyFloats, advantages: _AnyFloats) -> _Values:
    """float64 ``[M]``: (logprob - mean) * (advantage - mean) of the masked tokens.

    The means do not depend on the order of the tokens (``order_free_sum``).
    """
    count = max(len(logprobs), 1)
    mean_logprob = np.float64(order_free_sum(logprobs) / count)
    mean_advantage = np.float64(order_free_sum(advantages) / count)
    product: _Values = (logprobs - mean_logprob) * (advantages - mean_advantage)
    return product


def in_band(covariance: _Values, section: ClipCovLossSection) -> _Indices:
    """Indices of the covariances strictly inside the band; nan is outside."""
    return np.flatnonzero((covariance > section.low) & (covariance < section.high))


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


@dataclass(frozen=True, kw_only=True)
class _Masked:
    """The masked tokens of an update: ``positions`` ``[M]`` with the samples laid end to end, in
    order, and the values there."""

    positions: _Indices
    logprobs: _AnyFloats
    advantages: _AnyFloats

    @classmethod
    def of(cls, samples: Sequence[TrainSample], logprobs: Sequence[_AnyFloats]) -> "_Masked":
        mask = np.concatenate([sample.response_mask for sample in samples])
        flat_logprobs = np.concatenate(logprobs)
        assert len(flat_logprobs) == len(mask), "one log-prob per token of every sample"
        positions = np.flatnonzero(mask)
        return cls(
            positions=positions,
            logprobs=flat_logprobs.take(positions),
            advantages=np.concatenate([s.advantages for s in samples]).take(positions),
        )


def _draws(
    samples: Sequence[TrainSample], positions: _Indices, seed: int, step: int, *purpose: str
) -> DrawArray:
    """uint64 ``[P]``: a draw for each of these positions in ascending order, keyed by (seed, step,
    trajectory, segment, token)."""
    starts = np.cumsum([0, *(len(s.token_ids) for s in samples)])
    keys = [stream_key(seed, step, *purpose, str(s.trajectory_id), s.segment) for s in samples]
    counts = np.diff(np.searchsorted(positions, starts))
    tokens = positions - np.repeat(starts[:-1], counts)
    return stream_draws(np.repeat(np.array(keys, np.uint64), counts), tokens)


def _flags(samples: Sequence[TrainSample], chosen: _Indices) -> list[BoolArray]:
    """bool ``[L]`` for each sample from positions with the samples laid end to end."""
    ends = np.cumsum([len(sample.token_ids) for sample in samples])
    flags = np.zeros(ends[-1], np.bool_)
    flags[chosen] = True
    return np.split(flags, ends[:-1])
