"""What rank 0 does in a step: rollouts, rewards, filters, advantages, the hooks' updates.

Nothing here talks to other ranks; ``trainer.loop`` calls it between the policy's collective calls.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_spear.algorithms.advantages import turn_advantages
from megatron_spear.algorithms.filters import keep_groups, reward_spread
from megatron_spear.algorithms.official.rows import official_rows
from megatron_spear.algorithms.samples import make_samples
from megatron_spear.config.method import AlgorithmSection, RewardSection
from megatron_spear.config.rollout import RolloutSection
from megatron_spear.data.prompts import Cursor
from megatron_spear.rewards.compose import score
from megatron_spear.rewards.row_marks import mark_rows
from megatron_spear.rewards.summary import reward_metrics
from megatron_spear.rollout.rollouter import Rollouter
from megatron_spear.rollout.summary import lag_metrics, rollout_metrics
from megatron_spear.trainer.ahead import RolloutsAhead
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.marking import counted, filters_in_force
from megatron_spear.types import (
    ConsumedPrompt,
    Fate,
    RowKey,
    ScoredGroup,
    ScoredTrajectory,
    StepContext,
    TrainSample,
    TrajectoryGroup,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """The rollout stage of one step: the ``groups`` to go on with, as the hooks left them, all that
    were ``played``, each with the ``positions`` of its prompt, and metrics."""

    groups: tuple[ScoredGroup, ...]
    played: tuple[TrajectoryGroup, ...]
    positions: tuple[Any, ...]
    metrics: dict[str, float]

    @property
    def example(self) -> ScoredTrajectory | None:
        """The last trajectory that is gone on with."""
        return next((g.members[-1] for g in reversed(self.groups) if g.members), None)

    def consumed(self, trained: Collection[str]) -> tuple[ConsumedPrompt, ...]:
        """What became of each prompt; ``trained`` are the ids of the groups that were trained
        on."""
        return tuple(
            ConsumedPrompt(
                position=position,
                prompt_id=group.prompt.prompt_id,
                fate=_fate(group, trained),
            )
            for position, group in zip(self.positions, self.played, strict=True)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """One round of rollouts: its prompts' positions, their groups as ``played`` and as ``scored``,
    and those ``chosen`` by the hooks, with the rewards they gave."""

    positions: tuple[Any, ...]
    played: tuple[TrajectoryGroup, ...]
    scored: tuple[ScoredGroup, ...]
    chosen: tuple[ScoredGroup, ...]


def _fate(group: TrajectoryGroup, trained: Collection[str]) -> Fate:
    if not group.members:
        return Fate.FAILED
    return Fate.TRAINED if group.group_id in trained else Fate.FILTERED


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Rank 0's stages. ``ahead`` plays each step's first round early (``rollout.max_lag``)."""

    cursor: Cursor
    rollouter: Rollouter
    hooks: HookCalls
    rollout: RolloutSection
    reward: RewardSection
    algorithm: AlgorithmSection
    ahead: RolloutsAhead | None = None

    def collect(self, ctx: StepContext, progress: Callable[[int], None] | None = None) -> Collected:
        """Roll out and score the next prompts, and let the hooks see and change them.

        In up to ``dynamic_sampling_rounds`` further rounds, groups of equal rewards, which teach
        nothing, make room for groups of further prompts; those of the last round stay, whatever
        they are. Prompts are consumed once, replaced groups are gone for good. Each round goes
        through the hooks by itself, so that they see every group once, and rewards are compared as
        they leave them. Metrics are over the groups of all rounds, with the rewards before hooks;
        what comes after this sees those that stay.
        """
        rounds = [self._play(ctx, 0, self.rollout.prompts_per_step, 0, progress)]
        groups, replaced = list(rounds[0].chosen), 0
        for number in range(1, 1 + self.algorithm.dynamic_sampling_rounds):
            seats = self._equal(ctx, groups)
            if not seats:
                break
            finished = sum(len(each.played) for each in rounds) * self.rollout.group_size
            rounds.append(self._play(ctx, number, len(seats), finished, progress))
            stay = [group for seat, group in enumerate(groups) if seat not in seats]
            groups, replaced = [*stay, *rounds[-1].chosen], replaced + len(seats)
        played = tuple(group for each in rounds for group in each.played)
        scored = [group for each in rounds for group in each.scored]
        metrics = rollout_metrics(played)
        metrics |= lag_metrics(played, ctx.policy_version, self.rollout.max_lag)
        metrics |= reward_metrics(scored, ctx.coefficients.intrinsic_weight)
        if self.algorithm.dynamic_sampling_rounds:
            metrics["filter/num_sampling_rounds"] = float(len(rounds) - 1)
            metrics["filter/num_resampled_groups"] = float(replaced)
        return Collected(
            groups=tuple(groups),
            played=played,
            positions=tuple(position for each in rounds for position in each.positions),
            metrics=metrics,
        )

    def before_update(self) -> None:
        """Wait for the rollouts that the present weights have to finish."""
        if self.ahead is not None:
            self.ahead.before_update()

    def samples(
        self, ctx: StepContext, scored: tuple[ScoredGroup, ...]
    ) -> tuple[list[TrainSample], dict[str, float]]:
        """Mark, filter, compare: the step's samples with their advantages, and metrics."""
        marked, counting, metrics = self._marked(scored)
        if self.algorithm.compat == "official":
            size = self.rollout.group_size
            rows, filtered = official_rows(ctx, scored, marked, self.algorithm, size)
            return rows, metrics | filtered
        weight = ctx.coefficients.intrinsic_weight
        kept, filtered = keep_groups(counting, self.algorithm.keep_groups_fraction, weight)
        advantages = turn_advantages(kept, self.algorithm, weight, marked)
        names = {group.group_id for group in kept}
        whole = [group for group in scored if group.group_id in names]
        return make_samples(whole, advantages, marked), metrics | filtered

    def _play(
        self,
        ctx: StepContext,
        number: int,
        num_prompts: int,
        finished: int,
        progress: Callable[[int], None] | None,
    ) -> _Round:
        """Round ``number``: the next prompts, played, scored and shown to the hooks.

        Group ids and draws of a further round are keyed by its number too. Such a round may be of
        one prompt, so it may fail as a whole without ending the run. ``finished`` attempts of the
        step came before.
        """
        if self.ahead is not None and number == 0:
            positions, groups = self.ahead.play(ctx, progress)
        else:
            positions = self.cursor.claim(num_prompts)
            groups = self.rollouter.collect_sync(
                [self.cursor.at(position) for position in positions],
                group_size=self.rollout.group_size,
                seed=(ctx.seed, ctx.step, number) if number else (ctx.seed, ctx.step),
                temperature=self.rollout.temperature,
                progress=progress and (lambda count: progress(finished + count)),
                all_may_fail=number > 0,
            )
        played = tuple(groups)
        self.hooks.on_played(ctx, played)
        scored = tuple(score(group, self.reward) for group in played)
        return _Round(
            positions=tuple(positions),
            played=played,
            scored=scored,
            chosen=self.hooks.on_scored(ctx, scored),
        )

    def _equal(self, ctx: StepContext, groups: Sequence[ScoredGroup]) -> list[int]:
        """Places of the groups whose rewards, of the members that count, are all equal."""
        _, counting, _ = self._marked(groups)
        weight = ctx.coefficients.intrinsic_weight
        return [seat for seat, group in enumerate(counting) if not reward_spread(group, weight)]

    def _marked(
        self, groups: Sequence[ScoredGroup]
    ) -> tuple[frozenset[RowKey], Sequence[ScoredGroup], dict[str, float]]:
        """The rows to learn nothing from, the groups as statistics count them, and metrics."""
        marked, metrics = mark_rows(groups, filters_in_force(self.algorithm))
        return marked, counted(groups, marked, self.algorithm), metrics


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
