"""What cannot fit, by how much, and what would help."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_spear.cluster.planner.engine_memory import engine_memory
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.memory import RankMemory, training_memory
from megatron_spear.cluster.planner.models import planned_model
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.layout_fit import model_problems
from megatron_spear.conversion.sizes import model_parameters
from megatron_spear.errors import ConfigError


def require_fits(config: RunConfig, named: str | None = None) -> None:
    """ConfigError if the run does not fit the GPUs of ``cluster.*``.

    A CPU node's memory is not known here, so of a run on CPUs only the layout is checked.
    """
    _, shape = planned_model(config, named)
    found = list(refusals(Job.of_config(config, shape)))
    if found:
        raise ConfigError("this cannot fit:\n" + "\n".join(f"  {line}" for line in found))


def refusals(job: Job) -> Iterator[str]:
    """One line for each thing that keeps the run from its machines."""
    problems = list(model_problems(job.policy, job.shape, job.trainer_gpus))
    yield from problems
    if job.lengths.longest > job.shape.max_length:
        yield (
            f"rollout.max_context={job.lengths.longest} is above the model's "
            f"max_position_embeddings={job.shape.max_length}: engines refuse longer contexts; "
            "lower the first"
        )
    if problems or job.is_cpu:
        return
    memory = training_memory(job)
    if memory.short:
        yield _too_full(job, memory)
    if job.is_embedded:
        return
    engine = engine_memory(job)
    if not engine.fits:
        yield (
            f"an engine server of {job.engine_tensor_parallel} GPU(s) is short by "
            f"{gigabytes(engine.short)} GB a GPU: weights {gigabytes(engine.weights)} GB and one "
            f"context of {engine.longest:,} tokens do not fit {gigabytes(engine.share)} GB "
            f"(cluster.servers.memory_fraction={job.engine_memory_fraction:g}); raise "
            "cluster.servers.tensor_parallel, or set weight_sync.precision=fp8"
        )


def _too_full(job: Job, memory: RankMemory) -> str:
    size, chip = model_parameters(job.shape).total / 1e9, job.chip
    largest = f"{memory.largest} {gigabytes(memory.parts[memory.largest])} GB"
    helps = ", ".join(f"{text} ({gigabytes(total)} GB)" for text, total in what_helps(job))
    return (
        f"{size:.1f} B parameters on {job.trainer_gpus} x {chip.name} "
        f"({gigabytes(chip.memory_bytes)} GB): the fullest rank needs "
        f"{gigabytes(memory.total)} GB in {memory.moment} (pipeline stage {memory.stage + 1}), "
        f"short by {gigabytes(memory.short)} GB; largest: {largest}; what helps: "
        f"{helps or 'no single setting'}"
    )


def what_helps(job: Job) -> Iterator[tuple[str, int]]:
    """Single changes that make the run fit, with the bytes that the fullest rank then needs."""
    policy = job.policy
    offload = {"optimizer_offload": 1.0, "distributed_optimizer": True}
    tries = {
        "policy.distributed_optimizer=true": job.with_policy(distributed_optimizer=True),
        "policy.recompute=full": job.with_policy(recompute="full"),
        f"policy.tokens_per_microbatch={job.lengths.longest}": job.with_policy(
            tokens_per_microbatch=job.lengths.longest
        ),
        "policy.optimizer_offload=1.0"
        + ("" if policy.distributed_optimizer else " policy.distributed_optimizer=true"): (
            job.with_policy(**offload)
        ),
    }
    if job.shares_gpus and not job.is_embedded:
        lower = job.engine_memory_fraction / 2
        tries[f"cluster.servers.memory_fraction={lower:.2g}"] = replace(
            job, engine_memory_fraction=lower
        )
    for factor in (2, 4, 8):
        if policy.distributed_optimizer:
            more = replace(job, trainer_gpus=factor * job.trainer_gpus)
            tries[f"{more.trainer_gpus} GPUs that train"] = more
    told = False
    for text, other in tries.items():
        if "GPUs" in text and told:
            continue
        memory = training_memory(other)
        room = memory.host <= other.chip.host_bytes
        possible = not any(model_problems(other.policy, job.shape, other.trainer_gpus))
        if not memory.short and room and possible:
            told = told or "GPUs" in text
            yield text, memory.total


def gigabytes(num_bytes: float) -> str:
    """Decimal gigabytes for people: ``46.4``."""
    return f"{num_bytes / 1e9:,.1f}"
