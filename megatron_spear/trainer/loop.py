"""One SPEAR step, the same code on every rank.

    prompts -> rollout -> rewards, advantages -> old log-probs -> updates -> optimizer -> weights
                                                   replay ^                              to engine

Rank 0 (the controller) has the data; the policy's calls are collective, other ranks pass None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_spear.algorithms.policy_loss import PolicyLoss, finish_metrics
from megatron_spear.config.method import AlgorithmSection, ReplaySection
from megatron_spear.data.packing import PackedStep
from megatron_spear.metrics import merge
from megatron_spear.policy.pack_for import pack_for
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.rollout.engines.fleet_memory import FleetMemory
from megatron_spear.trainer.controller import (
    Collected,
    Controller,
    with_gradient,
    with_old_logprobs,
)
from megatron_spear.trainer.gpu_memory import give_back
from megatron_spear.trainer.hooks.calls import HookCalls
from megatron_spear.trainer.mini_batches import MiniBatch, MiniBatches, Plan, RefLogprobs
from megatron_spear.trainer.official_mini_batches import OfficialMiniBatches
from megatron_spear.trainer.ranks import broadcast
from megatron_spear.trainer.timing import PhaseTimer
from megatron_spear.trainer.work import Pass, PassWork, policy_work, rollout_work, work_metrics
from megatron_spear.types import (
    Fate,
    Origin,
    StepContext,
    StepReport,
    TrainSample,
    Update,
)
from megatron_spear.weight_sync.transport import Transport


@dataclass(frozen=True, kw_only=True)
class SpearStep:
    """Runs trainer steps. ``controller`` is None on ranks other than 0, and so is
    ``engine_memory``, that of servers which ``share_gpus`` with the ranks."""

    policy: MegatronPolicy
    weight_sync: Transport
    controller: Controller | None
    loss: PolicyLoss
    algorithm: AlgorithmSection
    replay: ReplaySection
    tokens_per_microbatch: int
    share_gpus: bool = False
    engine_memory: FleetMemory | None = None

    @property
    def mini_batches(self) -> MiniBatches:
        """Who is in which optimizer step, and the weights."""
        official = self.algorithm.compat == "official"
        kind = OfficialMiniBatches if official else MiniBatches
        return kind(algorithm=self.algorithm, replay=self.replay)

    def run(self, ctx: StepContext, progress: Callable[[int], None] | None = None) -> StepReport:
        """One trainer step: collect, compare, train, publish; returns its metrics."""
        timer, metrics, work = PhaseTimer(), {}, list[PassWork]()
        samples: list[TrainSample] = []
        collected: Collected | None = None
        with timer.phase("rollout"):
            if self.controller:
                collected = self.controller.collect(ctx, progress)
                metrics.update(collected.metrics)
                work.append(rollout_work(self.policy.shape, collected.played))
            if self.engine_memory:
                self.engine_memory.release()
        with timer.phase("advantages"):
            if self.controller and collected:
                samples, found = self.controller.samples(ctx, collected.groups)
                metrics.update(found)
        with timer.phase("old_logprobs"):
            moving = samples if self.mini_batches.moves_all else with_gradient(samples)
            active = self._with_old_logprobs(moving, work)
        with timer.phase("replay"):
            extra = self._extra_updates(ctx, active)
            plans = self.mini_batches.plan(ctx, samples, active, extra)
        with timer.phase("ref_logprobs"):
            reference = self._ref_logprobs(plans, work)
        metrics.update(self._train(ctx, plans, reference, timer, work))
        with timer.phase("rollouts_ahead"):
            if self.controller:
                self.controller.before_update()
        with timer.phase("weight_sync"):
            if self.share_gpus:
                give_back()
            if self.engine_memory:
                self.engine_memory.resume()
            metrics.update(self.weight_sync.publish(ctx.policy_version + 1))
        metrics.update(timer.metrics() | (work_metrics(work) if self.controller else {}))
        trained = {sample.trajectory_id.group for sample in with_gradient(samples)}
        return self._finish(ctx, metrics, collected, trained)

    def policy_logprobs(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        """Collective: the present policy's log-probs ``[L]`` of each sample, on the controller."""
        return self._logprobs("old_logprobs", samples, [Origin.ON_POLICY] * len(samples), [])

    def _with_old_logprobs(
        self, active: Sequence[TrainSample], work: list[PassWork]
    ) -> list[TrainSample]:
        """The policy's log-probs before the update, or the engine's where the config says so."""
        if self.algorithm.old_logprobs == "engine":
            return list(active)
        values = self._logprobs("old_logprobs", active, [Origin.ON_POLICY] * len(active), work)
        return with_old_logprobs(active, values) if self.controller else []

    def _extra_updates(self, ctx: StepContext, active: Sequence[TrainSample]) -> list[Update]:
        """What the hooks add; samples that only count in covariance are no matter of theirs."""
        if self.controller is None:
            return []
        seen = active if self.mini_batches.trains_all else with_gradient(active)
        self.controller.hooks.on_samples(ctx, seen)
        return self.controller.hooks.extra_updates(ctx)

    def _ref_logprobs(self, plans: Sequence[Plan], work: list[PassWork]) -> RefLogprobs:
        """The reference policy's log-probs of the step's on-policy samples, the hooks' among them,
        where the loss has a KL."""
        if not self.algorithm.kl.coef:
            return {}
        parts = [part for plan in plans for part in plan.parts]
        own = [s for part in parts if part.origin is Origin.ON_POLICY for s in part.trained]
        values = self._logprobs("ref_logprobs", own, [Origin.ON_POLICY] * len(own), work)
        return {(s.trajectory_id, s.segment): v for s, v in zip(own, values, strict=True)}

    def _current_logprobs(self, plan: Plan | None, work: list[PassWork]) -> list[list[np.ndarray]]:
        """Collective: for each part of a plan, its log-probs under the present weights, or [] where
        it does not need them."""
        parts = plan.parts if plan else ()
        needed = [part.trained if self.mini_batches.needs_current(part) else () for part in parts]
        pairs = zip(parts, needed, strict=True)
        origins = [part.origin for part, samples in pairs for _ in samples]
        together = [sample for samples in needed for sample in samples]
        values = iter(self._logprobs("current_logprobs", together, origins, work))
        return [[next(values) for _ in samples] for samples in needed]

    def _logprobs(
        self,
        name: Pass,
        samples: Sequence[TrainSample],
        origins: Sequence[Origin],
        work: list[PassWork],
    ) -> list[np.ndarray]:
        """Collective: log-probs ``[L]`` of each sample on the controller; [] where there are
        none. ``ref_logprobs`` are those of the reference policy."""
        if not broadcast(len(samples) > 0):
            return []
        packed = None
        if self.controller:
            nothing = tuple(np.zeros(len(s.token_ids)) for s in samples)
            packed = self._pack(samples, nothing, origins)
            work += policy_work(self.policy.shape, name, samples, origins)
        reference = name == "ref_logprobs"
        return self.policy.logprobs(packed, self.loss.temperature, reference=reference) or []

    def _train(
        self,
        ctx: StepContext,
        plans: Sequence[Plan],
        reference: RefLogprobs,
        timer: PhaseTimer,
        work: list[PassWork],
    ) -> dict[str, float]:
        """The step's optimizer steps; a mini-batch in which nothing is left is left out."""
        records, shares = [], []
        totals = {"train/num_rows": 0.0, "train/tokens": 0.0, "train/num_updates": 0.0}
        with timer.phase("train"):
            count = broadcast(len(plans))
        for index in range(count):
            plan = plans[index] if self.controller else None
            with timer.phase("current_logprobs"):
                current = self._current_logprobs(plan, work)
            with timer.phase("train"):
                batch = (
                    self.mini_batches.finish(ctx, plan, current, reference) if plan else MiniBatch()
                )
                shares.append(batch.metrics)
                work += policy_work(self.policy.shape, "train", batch.samples, batch.origins)
                if broadcast(len(batch.samples) > 0):
                    records.append(self._update(batch))
                    totals["train/num_updates"] += 1.0
                    totals["train/num_rows"] += len(batch.samples)
                    totals["train/tokens"] += sum(len(s.token_ids) for s in batch.samples)
        return totals | merge(shares) | merge(records)

    def _update(self, batch: MiniBatch) -> dict[str, float]:
        """Collective: one optimizer step; its metrics. Other ranks pass an empty batch."""
        apart = None
        if self.replay.gradient_norms and len(set(batch.origins)) > 1:
            batch, apart = batch.of(Origin.ON_POLICY), batch.of(Origin.REPLAY)
        packed, second = (
            self._pack(
                b.samples,
                b.weights,
                b.origins,
                columns={
                    "regularizer_weight": b.regularizer_weights,
                    "ref_logprobs": b.ref_logprobs,
                    "kl_selected": b.kl_selected,
                },
            )
            if b and b.samples
            else None
            for b in (batch, apart)
        )
        found = self.policy.train_step(packed, self.loss, second, scheduled=batch.scheduled)
        return finish_step_metrics(found)

    def _pack(
        self,
        samples: Sequence[TrainSample],
        weights: Sequence[np.ndarray],
        origins: Sequence[Origin],
        columns: Mapping[str, Sequence[np.ndarray]] | None = None,
    ) -> PackedStep:
        return pack_for(
            self.policy,
            samples,
            weights,
            origins,
            tokens_per_microbatch=self.tokens_per_microbatch,
            columns=columns,
        )

    def _finish(
        self,
        ctx: StepContext,
        metrics: dict[str, float],
        collected: Collected | None,
        trained: set[str],
    ) -> StepReport:
        """Add the hooks' metrics, make the report and tell the hooks. ``trained`` are ids of
        groups."""
        consumed = collected.consumed(trained) if collected else ()
        hooks = self.controller.hooks if self.controller else HookCalls({})
        metrics.update(hooks.metrics(ctx))
        coefficients = ctx.coefficients
        metrics["curriculum/intrinsic_weight"] = coefficients.intrinsic_weight
        metrics["curriculum/replay_weight"] = coefficients.replay_weight
        for fate in Fate if self.controller else ():
            metrics[f"prompts/{fate}"] = float(sum(prompt.fate is fate for prompt in consumed))
        report = StepReport(
            step=ctx.step,
            policy_version=ctx.policy_version + 1,
            metrics=metrics,
            consumed=consumed,
            example=collected.example if collected else None,
        )
        hooks.on_step_end(ctx, report)
        return report


_OPTIMIZER = {
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "skipped": "optimizer/num_skipped",
    "grad_norm_first": "optimizer/grad_norm_policy",
    "grad_norm_second": "optimizer/grad_norm_replay",
}


def finish_step_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """What ``train_step`` gave as metric names: the optimizer's numbers, and the loss's sums as
    means."""
    own = {_OPTIMIZER[k]: v for k, v in metrics.items() if k in _OPTIMIZER}
    sums = {k: v for k, v in metrics.items() if k not in _OPTIMIZER and k != "loss/total"}
    return own | finish_metrics(sums)
