"""Which trajectories share an optimizer step, and what each of their tokens weighs.

    plan      who is in which optimizer step: parts of one origin each, dealt by trajectory
    current   which of them need log-probs of the present weights (covariance, ratio filter)
    finish    token weights from the part's own counts, times its weight (Eq. 5), times the
              off-policy correction; 0 on tokens that covariance drops; rows without a gradient
              are left out

Counts, covariance means and quotas are those of a part in its whole optimizer step, whatever
micro-batches and ranks it is split over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_spear.algorithms.aggregation import WeightArray, token_weights
from megatron_spear.algorithms.covariance import (
    dropped_fraction,
    dropped_tokens,
    kl_selected_tokens,
)
from megatron_spear.algorithms.draws import raw_draws
from megatron_spear.algorithms.off_policy import correction_weights
from megatron_spear.algorithms.ratio_filter import within_ratio
from megatron_spear.config.losses import ClipCovLossSection, KlCovLossSection, LossSection
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.types import (
    BoolArray,
    Origin,
    StepContext,
    TrainSample,
    TrajectoryId,
    Update,
)

_Logprobs = Sequence[npt.NDArray[np.floating]]
RefLogprobs = Mapping[tuple[TrajectoryId, int], npt.NDArray[np.floating]]
"""The reference policy's log-probs ``[L]`` by trajectory and segment."""

METRIC_PREFIX = {Origin.ON_POLICY: "policy", Origin.REPLAY: "replay"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The samples of one origin in one optimizer step.

    ``counted`` are all of them, ``trained`` those that may have a gradient or count in covariance
    (final ``old_logprobs``); ``at_present`` says that these are of the present weights.
    """

    counted: tuple[TrainSample, ...]
    trained: tuple[TrainSample, ...]
    origin: Origin
    weight: float
    at_present: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One optimizer step to be; the learning-rate schedule moves on with ``scheduled`` ones."""

    parts: tuple[Part, ...]
    scheduled: bool = True


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """What enters one optimizer step, one entry a sample; arrays are ``[L]``."""

    samples: tuple[TrainSample, ...] = ()
    weights: tuple[WeightArray, ...] = ()
    origins: tuple[Origin, ...] = ()
    regularizer_weights: tuple[WeightArray, ...] = ()
    ref_logprobs: tuple[npt.NDArray[np.floating], ...] = ()
    kl_selected: tuple[BoolArray, ...] = ()
    scheduled: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)

    def of(self, origin: Origin) -> "MiniBatch":
        """The samples of one origin alone."""
        rows = [i for i, own in enumerate(self.origins) if own is origin]
        return MiniBatch(
            samples=tuple(self.samples[i] for i in rows),
            weights=tuple(self.weights[i] for i in rows),
            origins=tuple(self.origins[i] for i in rows),
            regularizer_weights=tuple(self.regularizer_weights[i] for i in rows),
            ref_logprobs=tuple(self.ref_logprobs[i] for i in rows),
            kl_selected=tuple(self.kl_selected[i] for i in rows),
            scheduled=self.scheduled,
            metrics=self.metrics,
        )


@dataclass(frozen=True, kw_only=True)
class MiniBatches:
    """The two settings sections and what follows from them."""

    algorithm: AlgorithmSection
    replay: ReplaySection

    @property
    def trains_all(self) -> bool:
        """Whether on-policy samples without advantage are trained too: KL and entropy bonus do."""
        return bool(self.algorithm.kl.coef or self.algorithm.entropy_coef)

    @property
    def moves_all(self) -> bool:
        """Whether on-policy samples without advantage matter: where they are trained, and to
        covariance means."""
        return self.trains_all or _covariance(self.algorithm.loss)

    def plan(
        self,
        ctx: StepContext,
        samples: Sequence[TrainSample],
        active: Sequence[TrainSample],
        extra: Sequence[Update],
    ) -> list[Plan]:
        """The step's optimizer steps.

        ``samples`` are all of the step, ``active`` those with a gradient; ``extra`` are the hooks'
        updates. Trajectories are dealt to ``algorithm.mini_batches`` steps in a drawn order; extra
        updates join these (``replay.combine: joint``) or get as many of their own after them.
        """
        count = self.algorithm.mini_batches
        present = self._old_are_present(ctx, active)
        final = {_key(s): s for s in active}
        own = [
            _part(rows, final, Origin.ON_POLICY, 1.0, at_present=index == 0 and present)
            for index, rows in enumerate(_dealt(ctx, samples, count))
        ]
        others = [
            [
                _part(rows, {_key(s): s for s in rows}, update.origin, update.weight)
                for rows in _dealt(ctx, update.samples, count)
            ]
            for update in extra
        ]
        added = [tuple(parts) for parts in zip(*others, strict=True)] or [()] * count
        if self.replay.combine == "joint":
            plans = [Plan(parts=(mine, *more)) for mine, more in zip(own, added, strict=True)]
        else:
            plans = [Plan(parts=(mine,)) for mine in own]
            plans += [Plan(parts=more, scheduled=False) for more in added]
        return [plan for plan in plans if any(part.trained for part in plan.parts)]

    def needs_current(self, part: Part) -> bool:
        """Whether ``finish`` needs log-probs of the present weights for this part.

        Before the trainer step's first update, new trajectories' ``old_logprobs`` are these, unless
        an engine gave them at an earlier version.
        """
        if part.origin is Origin.REPLAY:
            return _covariance(self.replay.loss) or self.replay.ratio_filter is not None
        return _covariance(self.algorithm.loss) and not part.at_present

    def _old_are_present(self, ctx: StepContext, active: Sequence[TrainSample]) -> bool:
        """Whether ``old_logprobs`` are of the present weights before the first update."""
        recomputed = self.algorithm.old_logprobs == "policy"
        return recomputed or all(s.policy_version >= ctx.policy_version for s in active)

    def finish(
        self,
        ctx: StepContext,
        plan: Plan,
        current: Sequence[_Logprobs],
        ref_logprobs: RefLogprobs,
    ) -> MiniBatch:
        """The mini-batch of a plan: its samples with a gradient.

        ``current[p]`` are the present log-probs ``[L]`` of part p's trained samples, empty where
        ``needs_current`` is False. ``ref_logprobs`` has all on-policy samples of a run with a KL,
        those of extra updates too.
        """
        rows: list[tuple[TrainSample, WeightArray, Origin, WeightArray, BoolArray]] = []
        metrics: dict[str, float] = {}
        for part, logprobs in zip(plan.parts, current, strict=True):
            finished, found = self._finish_part(ctx, part, logprobs)
            rows += finished
            metrics |= found
        zeros = [np.zeros(len(row[0].token_ids)) for row in rows]
        compares = bool(self.algorithm.kl.coef)
        return MiniBatch(
            samples=tuple(row[0] for row in rows),
            weights=tuple(row[1] for row in rows),
            origins=tuple(row[2] for row in rows),
            regularizer_weights=tuple(row[3] for row in rows),
            ref_logprobs=tuple(
                ref_logprobs[_key(row[0])] if compares and row[2] is Origin.ON_POLICY else zero
                for row, zero in zip(rows, zeros, strict=True)
            ),
            kl_selected=tuple(row[4] for row in rows),
            scheduled=plan.scheduled,
            metrics=metrics,
        )

    def _finish_part(
        self, ctx: StepContext, part: Part, logprobs: _Logprobs
    ) -> tuple[
        list[tuple[TrainSample, WeightArray, Origin, WeightArray, BoolArray]], dict[str, float]
    ]:
        replayed = part.origin is Origin.REPLAY
        metrics: dict[str, float] = {}
        counted, trained = part.counted, part.trained
        if not self.needs_current(part):
            logprobs = [sample.old_logprobs for sample in trained]
        if replayed and self.replay.ratio_filter is not None:
            keep, metrics = within_ratio(trained, logprobs, self.replay.ratio_filter)
            kept = {sample.trajectory_id for sample, k in zip(trained, keep, strict=True) if k}
            counted = tuple(s for s in counted if s.trajectory_id in kept)
            logprobs = [values for values, k in zip(logprobs, keep, strict=True) if k]
            trained = tuple(sample for sample, k in zip(trained, keep, strict=True) if k)
        weights = self.weights(counted, trained, part.weight)
        regularizers = [0.0 * row if replayed else row.copy() for row in weights]
        corrections, found = self._corrections(trained)
        metrics |= {} if replayed else found
        dropped, selected, found = self.by_covariance(ctx, part.origin, trained, logprobs)
        metrics |= found
        finals = [
            np.where(drop, 0.0, weight * factor)
            for weight, factor, drop in zip(weights, corrections, dropped, strict=True)
        ]
        rows = zip(trained, finals, regularizers, selected, strict=True)
        return [
            (sample, weight, part.origin, regularizer, chosen)
            for sample, weight, regularizer, chosen in rows
            if self.has_gradient(sample, weight, regularizer, chosen)
        ], metrics

    def has_gradient(
        self,
        sample: TrainSample,
        weight: WeightArray,
        regularizer: WeightArray,
        selected: BoolArray,
    ) -> bool:
        """Whether a row can move the policy: by its advantages, by the penalty of its KL-selected
        tokens, or by a regularizer. The others only cost time; no loss has a term beside these."""
        regularized = self.trains_all and regularizer.any()
        return bool((weight * sample.advantages).any() or weight[selected].any() or regularized)

    def weights(
        self, counted: Sequence[TrainSample], trained: Sequence[TrainSample], scale: float
    ) -> list[WeightArray]:
        """float64 ``[L]`` of each trained sample, by the counts of all."""
        section = self.algorithm
        weights = token_weights(counted, section.aggregation, section.norm_length, scale=scale)
        by_key = {_key(s): row for s, row in zip(counted, weights, strict=True)}
        return [by_key[_key(sample)] for sample in trained]

    def _corrections(
        self, trained: Sequence[TrainSample]
    ) -> tuple[list[WeightArray], dict[str, float]]:
        section = self.algorithm.off_policy_correction
        if self.algorithm.old_logprobs == "engine":  # the engine's, compared with themselves
            return [np.ones(len(s.token_ids)) for s in trained], {}
        return correction_weights(trained, section.mode, low=section.low, high=section.high)

    def by_covariance(
        self, ctx: StepContext, origin: Origin, trained: Sequence[TrainSample], logprobs: _Logprobs
    ) -> tuple[list[BoolArray], list[BoolArray], dict[str, float]]:
        """(dropped, KL-selected) bool ``[L]`` of each sample, and metrics."""
        section = self.replay.loss if origin is Origin.REPLAY else self.algorithm.loss
        none = [np.zeros(len(s.token_ids), np.bool_) for s in trained]
        match section:
            case ClipCovLossSection():
                dropped = dropped_tokens(
                    trained,
                    logprobs,
                    section,
                    clip_low=section.clip_low,
                    clip_high=section.clip_high,
                    seed=ctx.seed,
                    step=ctx.step,
                )
                share = dropped_fraction(trained, dropped)
                return dropped, none, {f"{METRIC_PREFIX[origin]}/cov_dropped_fraction": share}
            case KlCovLossSection():
                chosen = kl_selected_tokens(
                    trained, logprobs, fraction=section.fraction, seed=ctx.seed, step=ctx.step
                )
                return none, chosen, {}
        return none, none, {}


def _covariance(section: LossSection) -> bool:
    return isinstance(section, ClipCovLossSection | KlCovLossSection) and section.fraction > 0


def _key(sample: TrainSample) -> tuple[TrajectoryId, int]:
    return sample.trajectory_id, sample.segment


def _part(
    rows: Sequence[TrainSample],
    final: Mapping[tuple[TrajectoryId, int], TrainSample],
    origin: Origin,
    weight: float,
    *,
    at_present: bool = False,
) -> Part:
    return Part(
        counted=tuple(rows),
        trained=tuple(final[_key(s)] for s in rows if _key(s) in final),
        origin=origin,
        weight=weight,
        at_present=at_present,
    )


def _dealt(ctx: StepContext, samples: Sequence[TrainSample], count: int) -> list[list[TrainSample]]:
    """The samples by mini-batch: trajectories in a drawn order, dealt evenly."""
    ids = sorted({s.trajectory_id for s in samples}, key=str)
    if count > 1:
        ids.sort(key=lambda i: int(raw_draws(1, ctx.seed, ctx.step, "mini-batch", str(i))[0]))
    seats = {trajectory: position % count for position, trajectory in enumerate(ids)}
    return [[s for s in samples if seats[s.trajectory_id] == seat] for seat in range(count)]
