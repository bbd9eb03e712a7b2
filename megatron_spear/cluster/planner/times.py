"""Seconds of a step by phase, of a run on given machines, and what binds."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_spear.cluster.planner.decoding import Engine, Play, RolloutTime, rollout_time
from megatron_spear.cluster.planner.resharding import Resharding
from megatron_spear.cluster.planner.training import (
    Passes,
    Trainer,
    logprob_time,
    model_flops,
    train_time,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of a trainer step. ``total_s`` is their sum where rollout and training take turns,
    else the time from one step to the next."""

    rollout_s: float
    old_logprobs_s: float
    replay_s: float
    train_s: float
    weight_sync_s: float
    total_s: float
    trainer_idle: float
    """Share of the total in which the trainer waits."""
    engine_idle: float
    """Share of the total in which the engines do nothing, or less than when full."""
    mfu: float
    """Model FLOPs of training over those of the training ranks' peak in ``train_s``."""
    tokens_per_s: float
    """Sampled tokens over the total."""
    binds: str
    """What to look at first."""


def times_of(step: Step) -> StepTimes:
    """The step's times."""
    tokens = step.play.num_trajectories * step.play.mean_tokens
    replayed = step.replayed * tokens
    trained = train_time(step.trainer, tokens, step.updates)
    replay_s = 0.0
    if replayed:
        with_replay = train_time(step.trainer, tokens + replayed, step.updates)
        replay_s = with_replay.total_s - trained.total_s
        replay_s += logprob_time(step.trainer, replayed).total_s
    old_s = step.logprob_passes * logprob_time(step.trainer, tokens).total_s
    rollout = rollout_time(step.engine, step.num_engines, step.play)
    trainer_s = old_s + replay_s + trained.total_s
    rollout_s, total_s = _total(step, rollout, trainer_s)
    chip = step.trainer.machines.chip
    peak = chip.bf16_flops * step.trainer.layout.world_size
    return StepTimes(
        rollout_s=rollout_s,
        old_logprobs_s=old_s,
        replay_s=replay_s,
        train_s=trained.total_s,
        weight_sync_s=step.update.seconds,
        total_s=total_s,
        trainer_idle=1 - (trainer_s + step.update.seconds) / total_s,
        engine_idle=max(0.0, 1 - rollout.work_s / total_s),
        mfu=model_flops(step.trainer, tokens) / (peak * trained.total_s),
        tokens_per_s=step.play.num_trajectories * step.play.lengths.mean / total_s,
        binds=_what_binds(step, rollout, rollout_s, trainer_s, old_s, replay_s, trained),
    )


def _total(step: Step, rollout: RolloutTime, trainer_s: float) -> tuple[float, float]:
    """(rollout, total) seconds.

    With rollouts ahead, sets overlap: engines are as full as max_lag + 1 sets make them, and the
    longest trajectory may take as many steps. ``simulator.py`` has it without these means.
    """
    sync_s = step.update.seconds
    if step.max_lag == 0:
        return rollout.alone_s, rollout.alone_s + trainer_s + sync_s
    if step.schedule == "deterministic":
        return rollout.alone_s, max(rollout.alone_s, trainer_s) + sync_s
    sets = step.max_lag + 1
    ahead = rollout_time(step.engine, step.num_engines, _more(step.play, sets))
    rollout_s = max(ahead.work_s / sets, ahead.longest_s / sets)
    return rollout_s, max(rollout_s, trainer_s) + sync_s


def _more(play: Play, sets: int) -> Play:
    return replace(play, num_prompts=sets * play.num_prompts)


def _what_binds(
    step: Step,
    rollout: RolloutTime,
    rollout_s: float,
    trainer_s: float,
    old_s: float,
    replay_s: float,
    trained: Passes,
) -> str:
    if rollout_s >= trainer_s:
        tail = rollout.longest_s > 0.5 * rollout_s * (step.max_lag + 1)
        if tail and rollout.alone_s > 1.5 * rollout.work_s:
            return "rollout: the longest trajectory, when the others are done"
        return f"rollout: {_of_decoding(step)}"
    parts = {"log-probs": old_s, "replay": replay_s, "train": trained.total_s}
    name = max(parts, key=lambda part: parts[part])
    if name != "train":
        return name
    inside = {
        "products and attention": trained.work_s,
        "exchanges within micro-batches": trained.exchange_s,
        "the pipeline's beginning and end": trained.bubble_s,
        "gradients between data-parallel ranks": trained.reduce_s,
        "the optimizer": trained.optimizer_s,
    }
    return f"train: {max(inside, key=lambda part: inside[part])}"


def _of_decoding(step: Step) -> str:
    count = step.play.num_trajectories / step.num_engines
    contexts = np.array([min(count, step.engine.slots)])
    parts = step.engine.parts_of_decode(contexts, step.play.mean_context)
    return "decoding, " + max(parts, key=lambda part: float(parts[part]))
