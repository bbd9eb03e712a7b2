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
| ``group-mean-token-mean`` | mean of groups' token means | 1 / (groups * own group's tokens) |

``seq-mean-token-sum-norm`` is Dr. GRPO's (arXiv 2503.20783), the mean over trajectories included:
the official code divides the sum over rows by the padded width alone.
The official ``seq-norm-token-sum`` is ``group-mean-token-mean`` over the group size: it takes the
mean over *rows* of (the row's sum / the tokens of its group), and its groups are blocks of
consecutive rows, so it also depends on their order.
A trajectory counts once, however many segments it has; one without masked tokens still counts, and
so does such a group.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_spear.errors import ConfigError
from megatron_spear.types import TrainSample, TrajectoryId

WeightArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Numbers of masked tokens by trajectory, by group and in all."""

    own: Counter[TrajectoryId]
    group: Counter[str]
    total: int


_WEIGHTS: dict[str, Callable[[_Tokens, TrajectoryId, int], float]] = {
    "token-mean": lambda n, _id, _length: 1.0 / n.total,
    "seq-mean-token-sum": lambda n, _id, _length: 1.0 / len(n.own),
    "seq-mean-token-mean": lambda n, id_, _length: 1.0 / (len(n.own) * n.own[id_]),
    "seq-mean-token-sum-norm": lambda n, _id, length: 1.0 / (len(n.own) * length),
    "group-mean-token-mean": lambda n, id_, _length: 1.0 / (len(n.group) * n.group[id_.group]),
}


def token_weights(
    samples: Sequence[TrainSample], mode: str, norm_length: int, *, scale: float = 1.0
) -> list[WeightArray]:
    """float64 ``[L]`` for each sample: its tokens' loss weights, 0 outside the response mask.

    ``samples`` are all of one update in one optimizer step; ``scale`` is the update's own weight
    (SPEAR Eq. 5). Raises ConfigError for an unknown mode.

    Example: two trajectories of one group with 3 and 1 masked tokens: ``token-mean`` 1/4 each;
    ``seq-mean-token-sum`` 1/2 each; ``seq-mean-token-mean`` 1/6 and 1/2;
    ``seq-mean-token-sum-norm`` with norm_length 10: 1/20; ``group-mean-token-mean`` 1/4 each (of
    two groups: 1/6 and 1/2).
    """
    if mode not in _WEIGHTS:
        raise ConfigError(
            f"algorithm.aggregation: got {mode!r}, expected one of {', '.join(sorted(_WEIGHTS))}"
        )
    own: Counter[TrajectoryId] = Counter()
    group: Counter[str] = Counter()
    for sample in samples:
        count = int(sample.response_mask.sum())
        own[sample.trajectory_id] += count
        group[sample.trajectory_id.group] += count
    tokens = _Tokens(own=own, group=group, total=own.total())
    result = []
    for sample in samples:
        weights = np.zeros(len(sample.token_ids), np.float64)
        if sample.response_mask.any():
            value = _WEIGHTS[mode](tokens, sample.trajectory_id, norm_length)
            weights[sample.response_mask] = scale * value
        result.append(weights)
    return result
