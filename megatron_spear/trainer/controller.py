"""What rank 0 does in a step: rollouts, rewards, filters, advantages, the hooks' updates.

Nothing here talks to other ranks; ``trainer.loop`` calls it between the policy's collective calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.filters import keep_groups
from megatron_spear.algorithms.official.rows import official_rows
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection, RewardSection
from megatron_spear.config.schema import RolloutSection
from megatron_spear.data.prompts import Cursor
from megatron_spear.rewards.compose import score
from megatron_spear.rewards.summary import reward_metrics
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.summary import rollout_metrics
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.types import StepContext, TrainSample, TrajectoryGroup


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Rank 0's stages."""

    cursor: Cursor
    rollouter: Rollouter
    hooks: HookCalls
    rollout: RolloutSection
    reward: RewardSection
    algorithm: AlgorithmSection

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
        scored = self.hooks.on_scored(ctx, scored)
        if self.algorithm.compat == "official":
            rows, filtered = official_rows(ctx, scored, self.algorithm, self.rollout.group_size)
            return rows, metrics | filtered
        kept, filtered = keep_groups(scored, self.algorithm.keep_groups_fraction, weight)
        samples = make_samples(kept, turn_advantages(kept, self.algorithm, weight))
        return samples, metrics | filtered


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
