"""Seconds of a step by phase, and what binds."""

from dataclasses import dataclass

import numpy as np

from megatron_spear.cluster.planner.decoding import RolloutTime, rollout_time
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.simulator import Workload
from megatron_spear.cluster.planner.step import Step, step_of
from megatron_spear.cluster.planner.training import (
    Passes,
    logprob_time,
    model_flops,
    train_time,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of a trainer step. ``total_s`` is their sum where rollout and training take turns,
    else the time from one step to the next, and ``rollout_s`` what it were if training took none.
    """

    rollout_s: float
    old_logprobs_s: float
    """Passes without gradient over the new rows, a reference's included."""
    replay_s: float
    """What replayed rows add to training, and their own log-probs."""
    train_s: float
    weight_sync_s: float
    total_s: float
    trainer_idle: float
    """Share of the total in which the trainer waits."""
    engine_idle: float
    """Share of the total in which there is nothing to generate."""
    mfu: float
    """Model FLOPs of training on new rows over what the ranks' peak would do in ``train_s``."""
    tokens_per_s: float
    """Sampled tokens over the total."""
    binds: str
    """What to look at first."""

    @property
    def trainer_s(self) -> float:
        """What the trainer does between rollout and weight update."""
        return self.old_logprobs_s + self.replay_s + self.train_s


def step_times(job: Job) -> StepTimes:
    """The times of the job's step."""
    return times_of(step_of(job))


def times_of(step: Step) -> StepTimes:
    """The step's times."""
    play, trainer = step.play, step.trainer
    tokens = step.trained * play.mean_tokens
    trained = train_time(trainer, tokens, step.updates)
    replay_s = _replay_s(step, tokens, trained)
    old_s = step.logprob_passes * logprob_time(trainer, tokens).total_s
    old_s += step.others_s
    trainer_s, sync_s = old_s + replay_s + trained.total_s, step.update.seconds
    alone = rollout_time(step.engine, step.num_engines, play)
    rollout_s = _rollout_s(step, alone, trainer_s)
    turns = step.max_lag == 0 or step.same_gpus
    total_s = (rollout_s + trainer_s if turns else max(rollout_s, trainer_s)) + sync_s
    peak = trainer.machines.chip.bf16_flops * trainer.ranks.world_size
    return StepTimes(
        rollout_s=rollout_s,
        old_logprobs_s=old_s,
        replay_s=replay_s,
        train_s=trained.total_s,
        weight_sync_s=sync_s,
        total_s=total_s,
        trainer_idle=max(0.0, 1 - (trainer_s + sync_s) / total_s),
        engine_idle=max(0.0, 1 - rollout_s / total_s),
        mfu=model_flops(trainer, tokens) / (peak * trained.total_s),
        tokens_per_s=play.num_trajectories * play.lengths.mean / total_s,
        binds=_what_binds(step, alone, rollout_s, old_s, replay_s, trained),
    )


def workload_of(step: Step, times: StepTimes) -> Workload:
    """The step as the simulator takes it."""
    play = step.play
    contexts = np.arange(1, step.engine.slots + 1, dtype=np.float64)
    decode_s = step.engine.decode_s(contexts, play.mean_context)
    read = play.num_prompts * play.prompt + play.num_trajectories * play.observed
    read /= play.num_trajectories * play.num_turns
    return Workload(
        num_engines=step.num_engines,
        decode_s=np.concatenate(([0.0], decode_s)),
        num_prompts=play.num_prompts,
        group_size=play.group_size,
        lengths=play.lengths,
        train_s=times.trainer_s,
        update_s=times.weight_sync_s,
        read_s=step.engine.prefill_s(read, play.mean_context),
        reread_s=step.engine.prefill_s(play.mean_context, play.mean_context),
        num_turns=play.num_turns,
        env_s=play.env_s,
        max_lag=0 if step.same_gpus else step.max_lag,
        deterministic=step.schedule == "deterministic",
    )


def _replay_s(step: Step, tokens: float, trained: Passes) -> float:
    if not step.replayed:
        return 0.0
    replayed = step.replayed * step.play.mean_tokens
    both = train_time(step.trainer, tokens + replayed, step.updates)
    own_s = logprob_time(step.trainer, replayed).total_s if step.replay_logprobs else 0.0
    return max(0.0, both.total_s - trained.total_s) + own_s


def _rollout_s(step: Step, alone: RolloutTime, trainer_s: float) -> float:
    """From one set to the next, if only rollouts counted.

    Where sets overlap, an engine works at those of ``max_lag + 1`` steps: it decodes as many
    contexts as come in the time they stay (Little's law), and the longest trajectory has as many
    steps, less one training, to end in. ``simulator.py`` does without these means.
    """
    if step.max_lag == 0 or step.same_gpus or step.schedule == "deterministic":
        return alone.alone_s
    engine, play, sets = step.engine, step.play, step.max_lag + 1
    count = play.num_trajectories / step.num_engines
    most = min(float(engine.slots), sets * count)
    tokens, waits_s = count * play.lengths.mean, (play.num_turns - 1) * play.env_s
    full_s = float(engine.decode_s(np.array([most]), play.mean_context)[0])
    work_s = alone.prefill_s + tokens / most * full_s
    longest = play.longest
    period_s, others_s = work_s, trainer_s + step.update.seconds
    for _ in range(8):
        contexts = np.array([min(most, tokens * full_s / max(period_s, others_s))])
        full_s = float(engine.decode_s(np.maximum(contexts, 1.0), play.mean_context)[0])
        ends_s = (longest * full_s + waits_s + trainer_s + sets * step.update.seconds) / sets
        period_s = max(work_s, ends_s - step.update.seconds)
    return period_s


def _what_binds(
    step: Step,
    alone: RolloutTime,
    rollout_s: float,
    old_s: float,
    replay_s: float,
    trained: Passes,
) -> str:
    parts = {"log-probs": old_s, "replay": replay_s, "train": trained.total_s}
    turns = step.max_lag == 0 or step.same_gpus
    largest = max(parts, key=lambda part: parts[part])
    others_s = parts[largest] if turns else sum(parts.values())
    if step.update.seconds > max(rollout_s, others_s):
        return "weight update"
    if rollout_s < others_s:
        if largest != "train":
            return largest
        inside = {
            "products and attention": trained.work_s,
            "exchanges within micro-batches": trained.exchange_s,
            "beginning and end of the pipeline": trained.bubble_s,
            "gradients and weights between data-parallel ranks": trained.reduce_s,
            "the optimizer": trained.optimizer_s,
        }
        return f"train: {max(inside, key=lambda part: inside[part])}"
    if alone.work_s < 0.5 * rollout_s:
        return "rollout: the longest trajectories, when the others are done"
    if alone.prefill_s > 0.5 * alone.work_s:
        return "rollout: reading prompts and observations"
    contexts = np.array([min(step.engine.slots, step.play.num_trajectories / step.num_engines)])
    decode = step.engine.parts_of_decode(np.maximum(contexts, 1), step.play.mean_context)
    return "rollout: " + max(decode, key=lambda part: float(decode[part][0]))
