"""A trainer step as the times need it, and how a job gives one."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_spear.cluster.planner.decoding import Engine, Play
from megatron_spear.cluster.planner.engine_memory import engine_memory
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.long_tail import LongTail
from megatron_spear.cluster.planner.machines import machines_of, ranks_of
from megatron_spear.cluster.planner.resharding import Resharding, resharding
from megatron_spear.cluster.planner.training import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Who trains and generates what.

    ``logprob_passes`` are those without gradient over all trained rows (old log-probs, a
    reference's); ``trained`` and ``replayed`` are trajectories.
    """

    trainer: Trainer
    engine: Engine
    num_engines: int
    play: Play
    update: Resharding
    trained: float
    updates: int = 1
    logprob_passes: int = 1
    replayed: float = 0.0
    replay_logprobs: bool = False
    max_lag: int = 0
    schedule: Literal["continuous", "deterministic"] = "continuous"
    others_s: float = 0.0
    """What else the trainer does in a step."""
    same_gpus: bool = False
    """Engines and trainer take turns whatever ``max_lag`` is."""


def step_of(job: Job, *, env_s: float = 0.0) -> Step:
    """The job's step; ``env_s`` are seconds of environment between two turns."""
    machines, policy, rollout = machines_of(job), job.policy, job.rollout
    play = play_of(job, env_s)
    fp8 = job.weight_sync.precision == "fp8"
    tensor = job.engine_tensor_parallel
    engine = Engine(model=job.shape, machines=machines, tensor=tensor, slots=1, fp8=fp8)
    return Step(
        trainer=Trainer(
            model=job.shape,
            ranks=ranks_of(job),
            machines=machines,
            microbatch_tokens=policy.tokens_per_microbatch,
            keys=play.mean_keys,
            fp8=policy.fp8.recipe != "none",
            recompute=policy.recompute == "full",
            overlap_grad_reduce=policy.overlap_grad_reduce,
            overlap_param_gather=policy.overlap_param_gather,
            distributed_optimizer=policy.distributed_optimizer,
            offload=policy.optimizer_offload,
        ),
        engine=replace(engine, slots=_slots(job, play)),
        num_engines=job.num_engines,
        play=play,
        update=resharding(job),
        trained=job.trained_trajectories,
        updates=job.mini_batches,
        logprob_passes=int(job.recomputes_old_logprobs) + int(job.has_reference),
        replayed=job.replayed_trajectories,
        replay_logprobs=job.replay_needs_logprobs,
        max_lag=rollout.max_lag,
        schedule=rollout.schedule,
        same_gpus=job.shares_gpus,
    )


def play_of(job: Job, env_s: float = 0.0) -> Play:
    """The job's trajectories. What is not sampled comes in equal parts, one before each turn; the
    first is a group's own and read once for it."""
    lengths = job.lengths
    given = max(lengths.mean - lengths.sampled, 0)
    requests = lengths.turns * lengths.contexts
    most = min(lengths.turns * job.rollout.max_new_tokens, max(lengths.longest - given, 1))
    most = max(most, lengths.sampled)
    first = given / lengths.turns
    return Play(
        num_prompts=job.rollout.prompts_per_step,
        group_size=job.rollout.group_size,
        prompt=first,
        observed=lengths.contexts * given - first,
        lengths=LongTail(
            mean=lengths.sampled * lengths.contexts,
            longest=most * lengths.contexts,
            spread=lengths.spread,
        ),
        contexts=lengths.contexts,
        num_turns=requests,
        env_s=env_s,
    )


def _slots(job: Job, play: Play) -> int:
    """Contexts an engine decodes at once: what is asked of it, of all steps under way, and what its
    memory has room for."""
    rollout = job.rollout
    asked = min(rollout.max_slots, (rollout.max_lag + 1) * play.num_trajectories)
    if job.is_embedded:
        return asked
    asked = min(-(-asked // job.num_engines), rollout.max_requests_per_server)
    return max(min(asked, int(engine_memory(job).tokens / play.mean_context)), 1)
