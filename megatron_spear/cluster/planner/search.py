"""Layouts of the same run that fit its GPUs, the fastest first.

    tensor      divides heads, key-value groups, MLP and the GPUs of a node
    pipeline    divides the layers, at most 16 stages; each in 1, 2 or 4 pieces
    context     up to 8 where contexts are long; experts over at most a node
    the rest    data parallel, with a distributed optimizer wherever there are several ranks
    tokens      of a micro-batch: the most that fit, and the least that hold the longest context;
                activations are computed again only where they do not fit otherwise

Precision, FP8 and offload stay as they are. Ranks come from the times of ``times.step_times``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.memory import RankMemory, training_memory
from megatron_spear.cluster.planner.times import StepTimes, step_times
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.layout_fit import model_problems

MAX_PIPELINE, MAX_CONTEXT, PIECES = 16, 8, (1, 2, 4)
LONG_CONTEXT = 16384
"""Tokens of a context from which splitting its tokens over ranks is considered."""
MAX_TOKENS = 131072
"""Most tokens of a micro-batch that are considered."""
GAIN = 0.02
"""Share of a step below which another layout is not called better."""
_SHOWN = (
    "tensor_parallel",
    "context_parallel",
    "pipeline_parallel",
    "virtual_pipeline",
    "expert_parallel",
    "recompute",
    "tokens_per_microbatch",
    "distributed_optimizer",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A run with some layout, what it needs and how long a step takes."""

    job: Job
    memory: RankMemory
    times: StepTimes

    def changes(self, other: Job) -> dict[str, Any]:
        """The settings of its layout that differ from the other run's."""
        mine, others = self.job.policy, other.policy
        return {
            name: getattr(mine, name)
            for name in _SHOWN
            if getattr(mine, name) != getattr(others, name)
        }


def judged(job: Job) -> Choice:
    """The run as it is."""
    return Choice(job=job, memory=training_memory(job), times=step_times(job))


def best_layouts(job: Job) -> list[Choice]:
    """All that fit, the fastest first; of equally fast ones that which needs least memory."""
    found = [judged(each) for each in _fitting_all(job, _cuts(job))]
    return sorted(found, key=lambda choice: (choice.times.total_s, choice.memory.total))


def best_splits(job: Job, layouts: Iterable[Choice], most: int = 8) -> list[Choice]:
    """The best layout for each number of nodes that generate, the fastest first, this job's too.

    Only for engines on nodes of their own; ``layouts`` are those to try, of which ``most`` are.
    """
    nodes = job.num_gpus // job.gpus_per_node if job.gpus_per_node else 0
    whole_nodes = not job.shares_gpus and job.engine_gpus % max(job.gpus_per_node, 1) == 0
    if nodes < 2 or not whole_nodes or job.gpus_per_node % job.engine_tensor_parallel:
        return []
    cuts = [_cut_of(choice.job.policy) for choice in layouts]
    tried = list({tuple(cut.items()): cut for cut in cuts}.values())[:most]
    found = []
    for engine_nodes in sorted({max(nodes * part // 16, 1) for part in (1, 2, 3, 4, 6, 8, 10, 12)}):
        other = replace(
            job,
            trainer_gpus=(nodes - engine_nodes) * job.gpus_per_node,
            engine_gpus=engine_nodes * job.gpus_per_node,
        )
        own = [judged(each) for each in _fitting_all(other, tried)]
        found += sorted(own, key=lambda choice: choice.times.total_s)[:1]
    return sorted(found, key=lambda choice: choice.times.total_s)


def why(choice: Choice, other: Choice) -> str:
    """What makes the choice faster than the other, in words."""
    mine, others = choice.job.policy, other.job.policy
    reasons = []
    if others.recompute == "full" and mine.recompute != "full":
        reasons.append("no second forward pass")
    if mine.pipeline_parallel < others.pipeline_parallel:
        reasons.append("fewer stages to fill")
    elif mine.virtual_pipeline > others.virtual_pipeline:
        reasons.append("a pipeline in smaller pieces fills sooner")
    if mine.tensor_parallel < others.tensor_parallel:
        reasons.append("less sent between tensor parallel ranks")
    if mine.context_parallel < others.context_parallel:
        reasons.append("no keys and values gathered")
    if mine.distributed_optimizer and not others.distributed_optimizer:
        reasons.append("the optimizer's work is split")
    if mine.tokens_per_microbatch > others.tokens_per_microbatch:
        reasons.append("larger products")
    elif mine.tokens_per_microbatch < others.tokens_per_microbatch:
        reasons.append("more micro-batches share the work out")
    return "; ".join(reasons[:2]) or "better balanced"


def _fitting_all(job: Job, cuts: Iterable[Mapping[str, Any]]) -> Iterator[Job]:
    for cut in cuts:
        other = job.with_policy(**cut)
        own = {"distributed_optimizer": True, "overlap_grad_reduce": True}
        if job.trainer_gpus > _model_ranks(other.policy):
            other = other.with_policy(**own, overlap_param_gather=True)
        if not any(model_problems(other.policy, job.shape, job.trainer_gpus)):
            yield from _fitting(other)


def _fitting(job: Job) -> Iterator[Job]:
    """The run with as much of a micro-batch as fits, and with as little as is possible."""
    sizes = sorted({max(job.lengths.longest, 2**k) for k in range(12, 18)})
    sizes = [size for size in sizes if size <= max(MAX_TOKENS, job.lengths.longest)]
    for recompute in ("none", "full"):
        fits = []
        for size in sizes:
            other = job.with_policy(recompute=recompute, tokens_per_microbatch=size)
            if training_memory(other).short:
                break
            fits.append(other)
        if fits:
            yield from fits[:1] if len(fits) == 1 else (fits[0], fits[-1])
            return


def _cuts(job: Job) -> Iterator[dict[str, Any]]:
    """All ways to cut the model, possible or not."""
    world, shape = job.trainer_gpus, job.shape
    node = job.gpus_per_node or world
    contexts = [1]
    if job.lengths.longest >= LONG_CONTEXT or job.policy.context_parallel > 1:
        contexts = [size for size in (1, 2, 4, 8) if size <= MAX_CONTEXT]
    for tensor in _divisors(node):
        for pipeline in _divisors(shape.num_layers):
            for context in contexts:
                replica = tensor * context * pipeline
                if pipeline > MAX_PIPELINE or world % replica:
                    continue
                for expert in _experts(job, world // pipeline, node):
                    for pieces in PIECES if pipeline > 1 else (1,):
                        yield {
                            "tensor_parallel": tensor,
                            "context_parallel": context,
                            "pipeline_parallel": pipeline,
                            "virtual_pipeline": pieces,
                            "expert_parallel": expert,
                            "sequence_parallel": tensor > 1,
                        }


def _experts(job: Job, stage_ranks: int, node: int) -> list[int]:
    if not job.shape.num_experts:
        return [1]
    sizes = _divisors(job.shape.num_experts)
    return [size for size in sizes if size <= node and stage_ranks % size == 0]


def _cut_of(policy: PolicySection) -> dict[str, Any]:
    names = (*_SHOWN[:5], "sequence_parallel")
    return {name: getattr(policy, name) for name in names}


def _model_ranks(policy: PolicySection) -> int:
    """Ranks of a replica that do not share its optimizer's state."""
    return policy.tensor_parallel * policy.pipeline_parallel


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
