"""The official code's self-imitation loss of one replay micro-batch, from rewards to scaled loss.

    advantages = (reward - P50) * mask      P50: median of the recorded group means (SPEAR Eq. 2)
    keep       = rows whose mean advantage over the padded width is above 0      (Eq. 3-4)
    loss       = clip_cov(kept rows) * kept rows / mini-batch rows * gamma       (Eq. 5, 18-21)

Recalibration and the kept rows are the official ``verl`` tree's, without division by a standard
deviation.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_spear.algorithms.official.losses import OfficialClip, OfficialLoss, clip_cov


@dataclass(frozen=True, kw_only=True)
class SilLoss:
    """What one replay micro-batch gives: ``baseline`` P50, ``advantages`` ``[B, T]``, ``keep`` bool
    ``[B]``, the loss over the kept rows before scaling, and ``scaled`` (scalar)."""

    baseline: float
    advantages: Tensor
    keep: Tensor
    unscaled: OfficialLoss
    scaled: Tensor


def recalibrate(
    rewards: Tensor, mask: Tensor, group_means: npt.NDArray[np.floating]
) -> tuple[float, Tensor, Tensor]:
    """(P50, advantages ``[B, T]``, keep bool ``[B]``) from rewards ``[B]`` and the history.

    Example: rewards 1 and 0 over group means 0, 0.5, 1: P50 0.5, advantages 0.5 and -0.5, the first
    row is kept.
    """
    baseline = float(np.percentile(group_means, 50))
    advantages = (rewards - baseline).unsqueeze(-1) * mask
    return baseline, advantages, advantages.mean(-1) > 0


def sil_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    rewards: Tensor,
    group_means: npt.NDArray[np.floating],
    clip: OfficialClip,
    *,
    aggregation: str,
    mini_batch_rows: int,
    weight: float,
    permutation: Tensor | None = None,
) -> SilLoss:
    """The replay loss of rows ``[B, T]`` at ``weight`` gamma.

    ``permutation`` orders the eligible tokens of the kept rows (see ``clip_cov``). Where no row is
    kept, which the official buffer never releases, the loss is that of an empty micro-batch.
    """
    baseline, advantages, keep = recalibrate(rewards, mask, group_means)
    unscaled, _ = clip_cov(
        logprobs[keep],
        old_logprobs[keep],
        advantages[keep],
        mask[keep],
        clip,
        aggregation=aggregation,
        permutation=permutation,
    )
    share = int(keep.sum()) / mini_batch_rows
    return SilLoss(
        baseline=baseline,
        advantages=advantages,
        keep=keep,
        unscaled=unscaled,
        scaled=unscaled.loss * share * weight,
    )
