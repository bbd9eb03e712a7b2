"""Every token's final loss weight, so that the loss is a plain sum of weight * surrogate.

Weights come from global counts over all samples of one optimizer step. Loss and gradient therefore
do not depend on how the samples are split into micro-batches, packed, padded or spread over ranks
(the official code divides by padded widths and micro-batch shares, and does depend on them).

| mode | the loss is | weight of a masked token |
|---|---|---|
| ``token-mean`` | mean over tokens | 1 / tokens |
| ``seq-mean-token-sum`` | mean of trajectories' token sums | 1 / trajectories |
| ``seq-mean-token-mean`` | mean of trajectories' token means | 1 / (trajectories * own tokens) |
| ``seq-mean-token-sum-norm`` | the same over a constant length | 1 / (trajectories * norm_length) |

``seq-mean-token-sum-norm`` is Dr. GRPO's (arXiv 2503.20783), the mean over trajectories included:
the official code divides the sum over rows by the padded width alone.
A trajectory counts once, however many segments it has; one without masked tokens still counts.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.errors import ConfigError
from megatron_spear.types import TrainSample, TrajectoryId

WeightArray = npt.NDArray[np.float64]
_TokenCounts = Counter[TrajectoryId]

_WEIGHTS: dict[str, Callable[[_TokenCounts, TrajectoryId, int], float]] = {
    "token-mean": lambda counts, _id, _length: 1.0 / counts.total(),
    "seq-mean-token-sum": lambda counts, _id, _length: 1.0 / len(counts),
    "seq-mean-token-mean": lambda counts, id_, _length: 1.0 / (len(counts) * counts[id_]),
    "seq-mean-token-sum-norm": lambda counts, _id, length: 1.0 / (len(counts) * length),
}


def token_weights(
    samples: Sequence[TrainSample], mode: str, norm_length: int, *, scale: float = 1.0
) -> list[WeightArray]:
    """float64 ``[L]`` for each sample: its tokens' loss weights, 0 outside the response mask.

    ``samples`` are all of one update in one optimizer step; ``scale`` is the update's own weight
    (SPEAR Eq. 5). Raises ConfigError for an unknown mode.

    Example: two trajectories with 3 and 1 masked tokens: ``token-mean`` 1/4 each;
    ``seq-mean-token-sum`` 1/2 each; ``seq-mean-token-mean`` 1/6 and 1/2;
    ``seq-mean-token-sum-norm`` with norm_length 10: 1/20.
    """
    if mode not in _WEIGHTS:
        raise ConfigError(
            f"algorithm.aggregation: got {mode!r}, expected one of {', '.join(sorted(_WEIGHTS))}"
        )
    counts: _TokenCounts = Counter()
    for sample in samples:
        counts[sample.trajectory_id] += int(sample.response_mask.sum())
    result = []
    for sample in samples:
        weights = np.zeros(len(sample.token_ids), np.float64)
        if sample.response_mask.any():
            value = _WEIGHTS[mode](counts, sample.trajectory_id, norm_length)
            weights[sample.response_mask] = scale * value
        result.append(weights)
    return result
