"""Replayed trajectories the policy has moved away from: the ratio of a whole trajectory.

Of a token far outside the clip range nothing is learned: its gradient is clipped away (r > 1 +
clip_high) or scaled by r (r near 0). A trajectory whose tokens are like that on average only costs
time and counts in the means.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.config.losses import RatioFilterSection
from megatron_spear.types import TrainSample, TrajectoryId


def within_ratio(
    samples: Sequence[TrainSample],
    logprobs: Sequence[npt.NDArray[np.floating]],
    section: RatioFilterSection,
) -> tuple[list[bool], dict[str, float]]:
    """For each sample whether its trajectory stays, and metrics; all its segments share the answer.

    A trajectory's ratio is exp(mean of ``logprobs - old_logprobs`` over its masked tokens), the
    geometric mean of its token ratios. One that is not a number does not stay; one without masked
    tokens does.

    Example: token ratios 4 and 1 have the ratio 2; with high 1.9 the trajectory is left out.
    """
    sums: dict[TrajectoryId, float] = defaultdict(float)
    counts: dict[TrajectoryId, int] = defaultdict(int)
    for sample, values in zip(samples, logprobs, strict=True):
        mask = sample.response_mask
        gaps = values[mask].astype(np.float64) - sample.old_logprobs[mask]
        sums[sample.trajectory_id] += float(gaps.sum())
        counts[sample.trajectory_id] += len(gaps)
    with np.errstate(over="ignore"):
        ratios = {i: float(np.exp(total / max(counts[i], 1))) for i, total in sums.items()}
    stays = {i: section.low <= ratio <= section.high for i, ratio in ratios.items()}
    if not stays:
        return [], {}
    share = 1.0 - sum(stays.values()) / len(stays)
    return [stays[s.trajectory_id] for s in samples], {"replay/ratio_dropped_fraction": share}
