"""Correction of the engine-trainer mismatch: multipliers of the token weights.

The engine samples with its own kernels and precision, so its log-probs differ from the policy's.
The importance weight of a token is exp(old_logprobs - rollout_logprobs); the gradient is corrected
by multiplying each token's loss weight by it, after the weights too far out are tamed:

| mode | multiplier |
|---|---|
| ``none`` | 1: the mismatch is only measured |
| ``token-truncate`` | min(w, high), w of the token (truncated importance sampling, TIS) |
| ``sequence-truncate`` | min(w, high), w the product over the whole trajectory |
| ``token-mask`` | w where low <= w <= high, else 0 (IcePop) |
| ``sequence-mask`` | w where low <= w <= high, else 0, w the product over the whole trajectory |

A trajectory's product runs over the masked tokens of all its segments. Log weights are clamped to
+-20 (after summing), so multipliers are finite. Multipliers are not renormalised: a masked token
still counts in the global token counts of ``aggregation``.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.aggregation import WeightArray
from megatron_spear.algorithms.surrogates import MAX_LOG_RATIO
from megatron_spear.errors import ConfigError, EngineError
from megatron_spear.types import TrainSample, TrajectoryId

MODES = ("none", "token-truncate", "sequence-truncate", "token-mask", "sequence-mask")

_MAX_TERM = 1e6
"""Bound of one token's part in a sum: keeps +inf and -inf of one trajectory from giving NaN."""

_Values = npt.NDArray[np.float64]


def correction_weights(
    samples: Sequence[TrainSample], mode: str, *, high: float, low: float = 0.0
) -> tuple[list[WeightArray], dict[str, float]]:
    """float64 ``[L]`` for each sample: its tokens' multipliers, 1 outside the mask; and metrics.

    ``samples`` hold all segments of their trajectories. Only the masks read ``low``. Raises
    ConfigError for an unknown mode or bounds that do not hold 0 <= low <= 1 <= high, EngineError
    for a trained token whose log-probs are NaN, +inf, or -inf on both sides.

    Metrics (none without trained tokens): ``mismatch/logprob_gap_mean`` and
    ``mismatch/max_logprob_gap`` (absolute, nats), ``mismatch/effective_sample_fraction`` (of the
    weights before they are tamed), ``mismatch/truncated_fraction`` or ``mismatch/masked_fraction``
    (of the trained tokens).

    Example: token weights 0.5, 1 and 4 with high 2, low 0.8: ``token-truncate`` gives 0.5, 1, 2;
    ``token-mask`` 0, 1, 0; as one trajectory (product 2) ``sequence-truncate`` gives 2, 2, 2.
    """
    _check(mode, low, high)
    level, _, action = mode.partition("-")
    gaps = [_gaps(sample) for sample in samples]
    log_weights = _trajectory_sums(samples, gaps) if level == "sequence" else gaps
    raw = [np.exp(np.clip(row, -MAX_LOG_RATIO, MAX_LOG_RATIO)) for row in log_weights]
    outside = [(row > high) | ((row < low) & (action == "mask")) for row in raw]
    tamed = high if action == "truncate" else 0.0
    result = []
    for sample, weights, out in zip(samples, raw, outside, strict=True):
        multipliers = np.ones(len(sample.token_ids), np.float64)
        if mode != "none":
            multipliers[sample.response_mask] = np.where(out, tamed, weights)
        result.append(multipliers)
    trained = np.concatenate([*gaps, np.zeros(0)])
    if not len(trained):
        return result, {}
    units = _one_per_trajectory(samples, raw) if level == "sequence" else np.concatenate(raw)
    metrics = {
        "mismatch/logprob_gap_mean": float(np.abs(trained).mean()),
        "mismatch/max_logprob_gap": float(np.abs(trained).max()),
        "mismatch/effective_sample_fraction": effective_sample_fraction(units),
    }
    if mode != "none":
        name = "truncated" if action == "truncate" else "masked"
        metrics[f"mismatch/{name}_fraction"] = float(np.concatenate(outside).mean())
    return result, metrics


def effective_sample_fraction(weights: _Values) -> float:
    """Kish's effective sample size over the number of weights: (sum w)^2 / (N * sum w^2).

    In (0, 1]; 1 where all weights are equal. Example: weights 1 and 3 give 16 / (2 * 10) = 0.8.
    """
    scaled = weights / weights.max()
    return float(scaled.sum() ** 2 / (len(weights) * np.square(scaled).sum()))


def _check(mode: str, low: float, high: float) -> None:
    if mode not in MODES:
        raise ConfigError(f"off-policy correction: got {mode!r}, expected one of {MODES}")
    if not 0.0 <= low <= 1.0 <= high < np.inf:
        raise ConfigError(
            f"off-policy correction: got low {low}, high {high}; expected 0 <= low <= 1 <= high, "
            "both finite, so that a weight of 1 (no mismatch) is left alone"
        )


def _gaps(sample: TrainSample) -> _Values:
    """float64: log weights of the masked tokens of one sample."""
    mask = sample.response_mask
    old = sample.old_logprobs[mask].astype(np.float64)
    rollout = sample.rollout_logprobs[mask].astype(np.float64)
    bad = ~((old < np.inf) & (rollout < np.inf)) | (np.isneginf(old) & np.isneginf(rollout))
    if bad.any():
        at = int(np.flatnonzero(mask)[np.flatnonzero(bad)[0]])
        raise EngineError(
            f"trajectory {sample.trajectory_id}, segment {sample.segment}, token {at}: got "
            f"rollout log-prob {sample.rollout_logprobs[at]} and old log-prob "
            f"{sample.old_logprobs[at]}, expected numbers below infinity that can be compared; "
            "look for NaN in the engine's or the policy's logits"
        )
    gaps: _Values = old - rollout
    return gaps


def _trajectory_sums(samples: Sequence[TrainSample], gaps: Sequence[_Values]) -> list[_Values]:
    """For each masked token, the total over its trajectory's segments."""
    totals: dict[TrajectoryId, float] = defaultdict(float)
    for sample, row in zip(samples, gaps, strict=True):
        totals[sample.trajectory_id] += float(np.clip(row, -_MAX_TERM, _MAX_TERM).sum())
    return [
        np.full(len(row), totals[sample.trajectory_id])
        for sample, row in zip(samples, gaps, strict=True)
    ]


def _one_per_trajectory(samples: Sequence[TrainSample], raw: Sequence[_Values]) -> _Values:
    found = {s.trajectory_id: row[0] for s, row in zip(samples, raw, strict=True) if len(row)}
    return np.array(list(found.values()))
