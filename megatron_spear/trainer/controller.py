"""What rank 0 does in a step: rollouts, rewards, filters, advantages, the updates and their
weights.

Nothing here talks to other ranks; ``trainer.loop`` calls it between the policy's collective calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.aggregation import WeightArray, token_weights
from megatron_spear.algorithms.covariance import dropped_fraction, dropped_tokens
from megatron_spear.algorithms.draws import raw_draws
from megatron_spear.algorithms.filters import keep_groups
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection, CovarianceClipSection, RewardSection
from megatron_spear.config.schema import RolloutSection
from megatron_spear.data.prompts import PromptCursor
from megatron_spear.rewards.compose import score
from megatron_spear.rewards.summary import reward_metrics
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.summary import rollout_metrics
from megatron_spear.trainer.hooks.base import Hook
from megatron_spear.types import (
    Origin,
    StepContext,
    TrainSample,
    TrajectoryGroup,
    TrajectoryId,
    Update,
)


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """What enters one optimizer step: samples with the loss weight of each of their tokens."""

    samples: tuple[TrainSample, ...]
    weights: tuple[WeightArray, ...]
    origins: tuple[Origin, ...]


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Rank 0's stages."""

    cursor: PromptCursor
    rollouter: Rollouter
    hooks: Sequence[Hook]
    rollout: RolloutSection
    reward: RewardSection
    algorithm: AlgorithmSection
    covariance_clip: CovarianceClipSection | None

    def collect(
        self, ctx: StepContext, progress: Callable[[int], None] | None = None
    ) -> tuple[list[TrajectoryGroup], dict[str, float]]:
        """Roll out the next prompts; returns the groups and their metrics."""
        prompts = self.cursor.take(self.rollout.prompts_per_step)
        groups = self.rollouter.collect_sync(
            prompts,
            group_size=self.rollout.group_size,
            seed=(ctx.seed, ctx.step),
            temperature=self.rollout.temperature,
            progress=progress,
        )
        return groups, rollout_metrics(groups)

    def samples(
        self, ctx: StepContext, groups: Sequence[TrajectoryGroup]
    ) -> tuple[list[TrainSample], dict[str, float]]:
        """Score, filter, compare: the step's samples with their advantages, and metrics."""
        weight = ctx.coefficients.intrinsic_weight
        scored = tuple(score(group, self.reward) for group in groups)
        metrics = reward_metrics(scored, weight)
        for hook in self.hooks:
            scored = hook.on_scored(ctx, scored)
        kept, filtered = keep_groups(scored, self.algorithm.keep_groups_fraction, weight)
        samples = make_samples(kept, turn_advantages(kept, self.algorithm, weight))
        return samples, metrics | filtered

    def updates(self, ctx: StepContext) -> list[Update]:
        """What the hooks add to this step's optimizer steps."""
        return [update for hook in self.hooks for update in hook.extra_updates(ctx)]

    def mini_batches(
        self,
        ctx: StepContext,
        samples: Sequence[TrainSample],
        active: Sequence[TrainSample],
        extra: Sequence[Update],
        extra_logprobs: Sequence[Sequence[np.ndarray]],
    ) -> tuple[list[MiniBatch], dict[str, float]]:
        """The step's optimizer steps.

        ``samples`` are all of the step, ``active`` those with a gradient (final ``old_logprobs``);
        weights count all. ``extra_logprobs`` are current log-probs of each extra update's samples,
        for covariance clipping. Trajectories are dealt to the mini-batches in a drawn order.
        """
        count, metrics = self.algorithm.mini_batches, {}
        seats = self._seats(ctx, samples, count)
        final = {(s.trajectory_id, s.segment): s for s in active}
        batches: list[list[tuple[TrainSample, WeightArray, Origin]]] = [[] for _ in range(count)]
        for index, batch in enumerate(batches):
            own = [s for s in samples if seats[s.trajectory_id] == index]
            for sample, weights in zip(own, self._weights(own), strict=True):
                trained = final.get((sample.trajectory_id, sample.segment))
                if trained is not None:
                    batch.append((trained, weights, Origin.ON_POLICY))
        for update, logprobs in zip(extra, extra_logprobs, strict=True):
            dropped = self._dropped(ctx, update, logprobs)
            metrics["replay/cov_dropped_fraction"] = dropped_fraction(update.samples, dropped)
            seats = self._seats(ctx, update.samples, count)
            for index, batch in enumerate(batches):
                rows = [i for i, s in enumerate(update.samples) if seats[s.trajectory_id] == index]
                own = [update.samples[i] for i in rows]
                for i, weights in zip(rows, self._weights(own, update.weight), strict=True):
                    weights[dropped[i]] = 0.0
                    batch.append((update.samples[i], weights, update.origin))
        return [_mini_batch(batch) for batch in batches], metrics

    def _weights(self, samples: Sequence[TrainSample], scale: float = 1.0) -> list[WeightArray]:
        section = self.algorithm
        return token_weights(samples, section.aggregation, section.norm_length, scale=scale)

    def _dropped(
        self, ctx: StepContext, update: Update, logprobs: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        if self.covariance_clip is None:
            return [np.zeros(len(s.token_ids), bool) for s in update.samples]
        return dropped_tokens(
            update.samples,
            logprobs,
            self.covariance_clip,
            clip_low=self.algorithm.clip_low,
            clip_high=self.algorithm.clip_high,
            seed=ctx.seed,
            step=ctx.step,
        )

    @staticmethod
    def _seats(
        ctx: StepContext, samples: Sequence[TrainSample], count: int
    ) -> dict[TrajectoryId, int]:
        """Which mini-batch each trajectory belongs to: a drawn order, dealt evenly."""
        ids = sorted({s.trajectory_id for s in samples}, key=str)
        if count > 1:
            ids.sort(key=lambda i: int(raw_draws(1, ctx.seed, ctx.step, "mini-batch", str(i))[0]))
        return {trajectory: position % count for position, trajectory in enumerate(ids)}


def with_gradient(samples: Sequence[TrainSample]) -> list[TrainSample]:
    """The samples of trajectories with an advantage other than 0; the rest only cost time."""
    moving = {s.trajectory_id for s in samples if s.advantages.any()}
    return [s for s in samples if s.trajectory_id in moving]


def with_old_logprobs(
    samples: Sequence[TrainSample], logprobs: Sequence[np.ndarray]
) -> list[TrainSample]:
    """The samples with the policy's own log-probs (0 outside the mask) as ``old_logprobs``."""
    return [
        replace(s, old_logprobs=np.where(s.response_mask, values, 0.0).astype(np.float32))
        for s, values in zip(samples, logprobs, strict=True)
    ]


def logprob_gap(samples: Sequence[TrainSample]) -> dict[str, float]:
    """How far the engine's log-probs are from the policy's: mean and largest absolute
    difference."""
    if not samples:
        return {}
    gaps = np.concatenate(
        [np.abs(s.rollout_logprobs - s.old_logprobs)[s.response_mask] for s in samples]
    )
    if not len(gaps):
        return {}
    return {
        "mismatch/logprob_gap_mean": float(gaps.mean()),
        "mismatch/max_logprob_gap": float(gaps.max()),
    }


def _mini_batch(rows: Sequence[tuple[TrainSample, WeightArray, Origin]]) -> MiniBatch:
    return MiniBatch(
        samples=tuple(row[0] for row in rows),
        weights=tuple(row[1] for row in rows),
        origins=tuple(row[2] for row in rows),
    )
