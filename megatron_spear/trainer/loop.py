"""One SPEAR step, the same code on every rank.

    prompts -> rollout -> rewards, advantages -> old log-probs -> updates -> optimizer -> weights
                                                   replay ^                              to engine

Rank 0 (the controller) has the data; the policy's calls are collective, other ranks pass None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spear.algorithms.policy_loss import ClippedLoss, finish_metrics
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.data.packing import PackedStep, pack
from megatron_spear.metrics import merge
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.rollout.engine import RolloutEngine
from megatron_spear.trainer.controller import (
    Controller,
    MiniBatch,
    logprob_gap,
    with_gradient,
    with_old_logprobs,
)
from megatron_spear.trainer.ranks import broadcast
from megatron_spear.trainer.timing import PhaseTimer
from megatron_spear.types import Origin, StepContext, StepReport, TrainSample, Update
from megatron_spear.weight_sync.in_process import publish


@dataclass(frozen=True, kw_only=True)
class SpearStep:
    """Runs trainer steps. ``controller`` and ``engine`` are None on ranks other than 0."""

    policy: MegatronPolicy
    engine: RolloutEngine | None
    controller: Controller | None
    loss: ClippedLoss
    algorithm: AlgorithmSection
    tokens_per_microbatch: int

    def run(self, ctx: StepContext, progress: Callable[[int], None] | None = None) -> StepReport:
        """One trainer step: collect, compare, train, publish; returns its metrics."""
        timer, metrics = PhaseTimer(), {}
        samples: list[TrainSample] = []
        with timer.phase("rollout"):
            if self.controller:
                groups, found = self.controller.collect(ctx, progress)
                metrics.update(found)
        with timer.phase("advantages"):
            if self.controller:
                samples, found = self.controller.samples(ctx, groups)
                metrics.update(found)
        with timer.phase("old_logprobs"):
            active = self._with_old_logprobs(with_gradient(samples))
            if self.algorithm.old_logprobs == "policy":  # else the engine's, compared with itself
                metrics.update(logprob_gap(active))
        with timer.phase("replay"):
            extra = self._extra_updates(ctx, active)
        with timer.phase("replay_logprobs"):
            extra_logprobs = [self._current_logprobs(u) for u in broadcast_placeholders(extra)]
        with timer.phase("train"):
            metrics.update(self._train(ctx, samples, active, extra, extra_logprobs))
        with timer.phase("weight_sync"):
            sent = publish(self.policy, self.engine, ctx.policy_version + 1)
            metrics["weight_sync/bytes"] = float(sent)
        metrics.update(timer.metrics())
        return self._finish(ctx, metrics)

    def _with_old_logprobs(self, active: Sequence[TrainSample]) -> list[TrainSample]:
        """The policy's log-probs before the update, or the engine's where the config says so."""
        if self.algorithm.old_logprobs == "engine":
            return list(active)
        values = self._logprobs(active)
        return with_old_logprobs(active, values) if self.controller else []

    def _extra_updates(self, ctx: StepContext, active: Sequence[TrainSample]) -> list[Update]:
        if self.controller is None:
            return []
        for hook in self.controller.hooks:
            hook.on_samples(ctx, active)
        return self.controller.updates(ctx)

    def _current_logprobs(self, update: Update | None) -> list[np.ndarray]:
        """Log-probs of replayed samples under the current policy, if covariance clipping is on."""
        clipping = self.controller is not None and self.controller.covariance_clip is not None
        if not broadcast(clipping):
            return []
        return self._logprobs(update.samples if update else ())

    def _logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Collective: log-probs ``[L]`` of each sample on the controller; [] where there are
        none."""
        if not broadcast(len(samples) > 0):
            return []
        packed = None
        if self.controller:
            nothing = [np.zeros(len(s.token_ids)) for s in samples]
            packed = self._pack(
                MiniBatch(
                    samples=tuple(samples),
                    weights=tuple(nothing),
                    origins=(Origin.ON_POLICY,) * len(samples),
                )
            )
        return self.policy.logprobs(packed, self.loss.temperature) or []

    def _train(
        self,
        ctx: StepContext,
        samples: Sequence[TrainSample],
        active: Sequence[TrainSample],
        extra: Sequence[Update],
        extra_logprobs: Sequence[Sequence[np.ndarray]],
    ) -> dict[str, float]:
        """The step's optimizer steps; a mini-batch in which nothing has a gradient is left out."""
        batches: list[MiniBatch] = []
        metrics: dict[str, float] = {}
        if self.controller:
            batches, metrics = self.controller.mini_batches(
                ctx, samples, active, extra, extra_logprobs
            )
            batches = [b for b in batches if b.samples]
            metrics["train/num_rows"] = float(sum(len(b.samples) for b in batches))
            metrics["train/tokens"] = float(
                sum(len(s.token_ids) for b in batches for s in b.samples)
            )
        records = []
        for index in range(broadcast(len(batches))):
            batch = batches[index] if self.controller else None
            packed = self._pack(batch) if batch else None
            records.append(finish_step_metrics(self.policy.train_step(packed, self.loss)))
        return metrics | {"train/num_updates": float(len(records))} | merge(records)

    def _pack(self, batch: MiniBatch) -> PackedStep:
        layout = self.policy.ctx
        return pack(
            batch.samples,
            batch.weights,
            batch.origins,
            data_parallel=layout.data_size,
            tokens_per_microbatch=self.tokens_per_microbatch,
            pad_multiple=self.policy.pad_multiple,
        )

    def _finish(self, ctx: StepContext, metrics: dict[str, float]) -> StepReport:
        """Add the hooks' metrics, make the report and tell the hooks."""
        hooks = self.controller.hooks if self.controller else ()
        for hook in hooks:
            metrics.update(hook.metrics())
        coefficients = ctx.coefficients
        metrics["curriculum/intrinsic_weight"] = coefficients.intrinsic_weight
        metrics["curriculum/replay_weight"] = coefficients.replay_weight
        report = StepReport(step=ctx.step, policy_version=ctx.policy_version + 1, metrics=metrics)
        for hook in hooks:
            hook.on_step_end(ctx, report)
        return report


def broadcast_placeholders(updates: Sequence[Update]) -> list[Update | None]:
    """On the controller the updates themselves, on other ranks as many None."""
    count = broadcast(len(updates))
    return list(updates) if updates else [None] * count


_OPTIMIZER = {
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "skipped": "optimizer/num_skipped",
}


def finish_step_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """What ``train_step`` gave as metric names: the optimizer's numbers, and the loss's sums as
    means."""
    own = {_OPTIMIZER[k]: v for k, v in metrics.items() if k in _OPTIMIZER}
    sums = {k: v for k, v in metrics.items() if k not in _OPTIMIZER and k != "loss/total"}
    return own | finish_metrics(sums)
