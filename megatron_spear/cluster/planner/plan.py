"""The plan of a run: memory, times, what is refused, what would be better."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from megatron_spear.cluster.planner.engine_memory import EngineMemory, engine_memory
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.models import planned_model
from megatron_spear.cluster.planner.refusal import gigabytes, refusals
from megatron_spear.cluster.planner.resharding import Resharding, resharding
from megatron_spear.cluster.planner.search import (
    ROOM,
    Choice,
    best_layouts,
    best_splits,
    judged,
)
from megatron_spear.cluster.planner.simulator import Simulated, simulate
from megatron_spear.cluster.planner.step import step_of
from megatron_spear.cluster.planner.times import workload_of
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.layout_fit import model_problems

GAIN = 0.02
"""Share of a step below which nothing is called better."""
SIMULATED_STEPS, SIMULATED_TURNS = 4, 10_000
"""Steps that are simulated, and most turns in each: a second or so."""
NUM_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is known of a run before it is started.

    ``own`` and what follows from it are None where the layout is impossible. ``better`` are layouts
    with a shorter step, or all that fit where the own does not, the fastest first, each cut of the
    model once; ``num_fitting`` is how many were compared. ``split`` divides the nodes better,
    ``sharded`` is the run with ``weight_sync.transport=sharded``; None = no gain. ``ahead`` is
    the run in simulated time, where rollouts run ahead on machines of their own.
    """

    model: str
    job: Job
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    own: Choice | None
    engine: EngineMemory | None
    update: Resharding | None
    better: tuple[Choice, ...]
    num_fitting: int
    split: Choice | None
    sharded: Choice | None
    ahead: Simulated | None

    @property
    def fits(self) -> bool:
        """Whether nothing is refused."""
        return not self.refusals


def make_plan(
    config: RunConfig, *, named: str | None = None, mean_length: int | None = None
) -> Plan:
    """The plan of a run; ``named`` and ``mean_length`` as in ``planned_model`` and ``Job``.

    Raises ConfigError or CheckpointError where the model is not known.
    """
    name, shape = planned_model(config, named)
    job = Job.of_config(config, shape, mean_length=mean_length)
    refused = tuple(refusals(job))
    possible = not any(model_problems(job.policy, shape, job.trainer_gpus))
    own = judged(job) if possible else None
    layouts = best_layouts(job)
    if own is None or (own.memory.short and not layouts):
        layouts = layouts or best_layouts(job.with_policy(optimizer_offload=1.0))
    fits = own is not None and not own.memory.short
    limit_s = own.times.total_s * (1 - GAIN) if own and fits else inf
    better = [choice for choice in _distinct(layouts) if choice.times.total_s < limit_s]
    return Plan(
        model=name,
        job=job,
        refusals=refused,
        warnings=tuple(_warnings(job, own, mean_length)),
        own=own,
        engine=None if job.is_embedded or job.is_cpu else engine_memory(job),
        update=resharding(job) if own else None,
        better=tuple(better[:NUM_SHOWN]),
        num_fitting=len(layouts),
        split=_split(job, own, layouts),
        sharded=_sharded(job, own),
        ahead=_ahead(job, own),
    )


def _distinct(layouts: list[Choice]) -> Iterator[Choice]:
    """The fastest of each cut of the model."""
    seen = set()
    for choice in layouts:
        policy = choice.job.policy
        cut = (
            policy.tensor_parallel,
            policy.context_parallel,
            policy.pipeline_parallel,
            policy.expert_parallel,
        )
        if cut not in seen:
            seen.add(cut)
            yield choice


def _split(job: Job, own: Choice | None, layouts: list[Choice]) -> Choice | None:
    """Other numbers of nodes that train and generate, where these are faster than any layout."""
    known = [choice.times.total_s for choice in layouts]
    if own and not own.memory.short:
        known.append(own.times.total_s)
    splits = best_splits(job, layouts)
    faster = splits and splits[0].times.total_s < min(known, default=inf) * (1 - GAIN)
    return splits[0] if faster else None


def _sharded(job: Job, own: Choice | None) -> Choice | None:
    if own is None or job.is_embedded or job.weight_sync.transport == "sharded":
        return None
    section = job.weight_sync.model_copy(update={"transport": "sharded"})
    other = judged(replace(job, weight_sync=section))
    return other if other.times.total_s < own.times.total_s * (1 - GAIN) else None


def _ahead(job: Job, own: Choice | None) -> Simulated | None:
    """Some steps in simulated time, with lengths drawn: what means cannot say of a long tail.

    Of many engines a part is simulated, with its part of the prompts.
    """
    if own is None or not job.rollout.max_lag or job.shares_gpus:
        return None
    work = workload_of(step_of(job), own.times)
    turns = work.num_prompts * work.group_size * work.num_turns
    engines = max(1, min(work.num_engines, work.num_engines * SIMULATED_TURNS // turns))
    prompts = max(1, round(work.num_prompts * engines / work.num_engines))
    part = replace(work, num_engines=engines, num_prompts=prompts)
    return simulate(part, steps=SIMULATED_STEPS)


def _warnings(job: Job, own: Choice | None, mean_length: int | None) -> Iterator[str]:
    chip = job.chip
    if job.is_cpu:
        yield "CPU ranks: times are rough, and memory is this machine's, shared out"
    elif job.is_embedded:
        yield "the embedded engine generates on rank 0's CPU; use engine servers on GPUs"
    elif (engine := engine_memory(job)).fits and engine.contexts < engine.wanted:
        yield (
            f"a server's cache holds {engine.contexts} contexts of {engine.longest:,} tokens, and "
            f"{engine.wanted} are asked of it: some wait, or are begun again"
        )
    if not job.is_cpu and job.policy.precision == "fp32":
        yield "policy.precision=fp32 on GPUs: the times are those of bf16; set bf16"
    if 0 < job.num_gpus < job.node_gpus:
        yield f"{job.node_gpus - job.num_gpus} of {job.node_gpus} GPUs have nothing to do"
    if own is None:
        return
    memory = own.memory
    if memory.host > chip.host_bytes:
        yield (
            f"a rank needs {gigabytes(memory.host)} GB of the host's memory, and "
            f"{gigabytes(chip.host_bytes)} GB a GPU are assumed"
        )
    if not memory.short and memory.limit - memory.total < ROOM * memory.limit:
        yield "little memory is left; policy.tokens_per_microbatch is the first thing to lower"
    if job.data_parallel > job.trained_trajectories / job.mini_batches:
        yield (
            f"{job.data_parallel} replicas share {job.trained_trajectories} trajectories in "
            f"{job.mini_batches} optimizer step(s): some have nothing to train on"
        )
    if mean_length is None:
        yield (
            f"mean context length {job.lengths.mean:,} tokens is assumed, half of "
            "rollout.max_context; --mean-length N sets it"
        )
