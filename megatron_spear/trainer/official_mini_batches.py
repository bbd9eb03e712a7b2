"""Mini-batches of ``algorithm.compat: official``: weights and dropped tokens of its micro-batches.

What differs from ``mini_batches`` is what the official code does by micro-batch. Which rows share a
mini-batch is drawn as in the corrected mode; its rows in order, ``micro_batch_rows`` at a time, are
the micro-batches.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.aggregation import WeightArray
from megatron_spear.algorithms.covariance import dropped_fraction
from megatron_spear.algorithms.official.losses import OfficialClip
from megatron_spear.algorithms.official.micro_batches import (
    official_dropped,
    official_kl_selected,
    official_token_weights,
)
from megatron_spear.config.losses import ClipCovLossSection, KlCovLossSection
from megatron_spear.trainer.mini_batches import METRIC_PREFIX, MiniBatches
from megatron_spear.types import BoolArray, Origin, StepContext, TrainSample


class OfficialMiniBatches(MiniBatches):
    """Statistics, quotas and normalisation of each micro-batch; every row is trained."""

    @property
    def trains_all(self) -> bool:
        """True: the official code trains rows without advantage, and its means are over all."""
        return True

    def weights(
        self, counted: Sequence[TrainSample], trained: Sequence[TrainSample], scale: float
    ) -> list[WeightArray]:
        """The official weights; all counted rows are trained here."""
        assert len(counted) == len(trained), "the official mode leaves out no row"
        section = self.algorithm
        return official_token_weights(
            trained,
            section.official.micro_batch_rows,
            section.aggregation,
            section.norm_length,
            scale=scale,
        )

    def by_covariance(
        self,
        ctx: StepContext,
        origin: Origin,
        trained: Sequence[TrainSample],
        logprobs: Sequence[npt.NDArray[np.floating]],
    ) -> tuple[list[BoolArray], list[BoolArray], dict[str, float]]:
        """Each micro-batch drops by its own means and quota (clip_cov, kl_cov)."""
        section = self.replay.loss if origin is Origin.REPLAY else self.algorithm.loss
        none = [np.zeros(len(s.token_ids), np.bool_) for s in trained]
        rows = self.algorithm.official.micro_batch_rows
        match section:
            case ClipCovLossSection():
                clip = OfficialClip(**section.model_dump(exclude={"type", "dual_clip"}))
                key = (ctx.seed, ctx.step, origin.value)
                dropped = official_dropped(trained, logprobs, rows, clip, *key)
                name = f"{METRIC_PREFIX[origin]}/cov_dropped_fraction"
                return dropped, none, {name: dropped_fraction(trained, dropped)}
            case KlCovLossSection():
                return none, official_kl_selected(trained, logprobs, rows, section.fraction), {}
        return none, none, {}
