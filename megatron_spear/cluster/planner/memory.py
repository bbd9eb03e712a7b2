"""What the fullest training rank needs of its GPU, by part, at its worst moment.

    lasting     weights, gradients, Adam's state (``states``), and what no tensor is: CUDA's
                context, NCCL's buffers, and memory that the allocator cannot use; of a server on
                the same GPUs (``rollout.colocated``) what it keeps while it is paused
    training    activations and work (``activations``), and a second gradient where asked for
    reduction   on CPUs a copy of the gradients, which gloo makes for a distributed optimizer
    reference   a reference's weights, which come from the host for its pass (on a CPU they last)
    weights     two buckets for the engines, and one tensor gathered on the rank that sends, beside
    update      the share of a server on the same GPU (``cluster.servers.memory_fraction``), whose
                CUDA graphs and activations have the buckets' room during rollouts

The moments do not overlap, so a rank needs what lasts and the largest of them. Sources of the
constants are with them; docs/planner.md has them all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_spear.cluster.planner.activations import Activations, activations
from megatron_spear.cluster.planner.engine_memory import embedded_bytes
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.states import WEIGHT_BYTES, States, states
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape

CONTEXT_BYTES = 500 * 10**6
"""CUDA's context, its kernels loaded lazily: 300 MB and more (pytorch/pytorch issue 107667)."""
GROUP_BYTES = 600 * 10**6
"""NCCL's buffers of a group of ranks: 544 MB of two, 688 MB of more (NVIDIA/nccl issue 964, A100
with NVLink; its maintainers say that beyond two nodes it no longer grows, issue 864)."""
ALL_TO_ALL_BYTES = 3300 * 10**6
"""NCCL's buffers once experts' tokens were exchanged: 1.06 GB before and 4.34 GB after (NVIDIA/nccl
issue 1685, 8 H100)."""
UNUSABLE = 0.075
"""Share of a GPU that the caching allocator holds in pieces of no use. ZeRO (arXiv 1910.02054,
section 3.2) saw 30 % in extreme cases, and ``expandable_segments`` leaves little. A choice: with
CUDA and NCCL it makes the 8 GB of 80 that presets keep free (``config.presets.layouts``)."""
PROCESS_BYTES = 400 * 10**6
"""A CPU rank's Python with torch and Megatron, before any tensor (measured: 385 MB)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """The fullest training rank: its bytes by part at its worst moment, ``moment``."""

    parts: Mapping[str, int]
    moment: str
    stage: int
    limit: int
    host: int
    """What it needs of the host's memory beside that."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def short(self) -> int:
        """Bytes that are missing; 0 where it fits."""
        return max(self.total - self.limit, 0)

    @property
    def largest(self) -> str:
        """The part that is largest."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """States and activations of one rank, in bytes."""

    states: int
    activations: int

    @property
    def total(self) -> int:
        """Both."""
        return self.states + self.activations


def fullest_rank(shape: ModelShape, policy: PolicySection, world_size: int) -> RankBytes:
    """Tensors of training alone on GPUs in bf16: of the stage that needs most, those of a rank."""
    stages = (
        stage_bytes(shape, policy, world_size, stage) for stage in range(policy.pipeline_parallel)
    )
    return max(stages, key=lambda stage: stage.total)


def stage_bytes(
    shape: ModelShape,
    policy: PolicySection,
    world_size: int,
    stage: int,
    *,
    on_cpu: bool = False,
    microbatches: int | None = None,
) -> RankBytes:
    """Tensors of training alone, of each rank of a pipeline stage; ``activations`` is all that
    does not last, at its worst moment."""
    lasting = states(shape, policy, world_size, stage)
    packed = not on_cpu and policy.precision == "bf16"
    passing = activations(shape, policy, stage, packed=packed, microbatches=microbatches)
    copied = _copied_gradients(policy, world_size, lasting) if on_cpu else 0
    return RankBytes(states=lasting.total, activations=max(passing.total, copied))


def _copied_gradients(policy: PolicySection, world_size: int, lasting: States) -> int:
    """What gloo's reduce-scatter copies for a distributed optimizer; NCCL's works in place."""
    replicas = world_size // (policy.tensor_parallel * policy.pipeline_parallel)
    return lasting.gradients if policy.distributed_optimizer and replicas > 1 else 0


def training_memory(job: Job) -> RankMemory:
    """Of the fullest rank: the first stage has most micro-batches in flight, the last the logits,
    and the second may have more layers in FP8 than both; the others have less than the second."""
    last = job.policy.pipeline_parallel - 1
    stages = sorted({0, min(1, last), last})
    return max((_of_stage(job, stage) for stage in stages), key=lambda rank: rank.total)


def _of_stage(job: Job, stage: int) -> RankMemory:
    lasting = states(job.shape, job.policy, job.trainer_gpus, stage)
    passing = activations(
        job.shape,
        job.policy,
        stage,
        packed=not job.is_cpu and job.policy.precision == "bf16",
        microbatches=job.microbatches,
    )
    parts = {"weights": lasting.weights, "gradients": lasting.gradients}
    parts["optimizer"] = lasting.optimizer
    parts |= dict(_others(job, lasting))
    moments = dict(_moments(job, lasting, passing))
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    parts |= moments[moment]
    return RankMemory(
        parts={name: size for name, size in parts.items() if size},
        moment=moment,
        stage=stage,
        limit=job.chip.memory_bytes,
        host=0 if job.is_cpu else _host(job, lasting),
    )


def _others(job: Job, lasting: States) -> Iterator[tuple[str, int]]:
    """What lasts beside the states."""
    if job.is_cpu:
        yield "offloaded optimizer", lasting.host
        yield "reference weights", lasting.weights if job.has_reference else 0
        if job.is_embedded:
            weights, cache = embedded_bytes(job)
            yield "embedded engine's weights", weights
            yield "embedded engine's cache", cache
        yield "Python and libraries", PROCESS_BYTES
        return
    yield "CUDA and NCCL", CONTEXT_BYTES + _nccl_bytes(job)
    if _shares_its_gpu(job):
        together = GROUP_BYTES if job.engine_tensor_parallel > 1 else 0
        yield "a paused server", CONTEXT_BYTES + together
    yield "lost to the allocator", round(UNUSABLE * job.chip.memory_bytes)


def _shares_its_gpu(job: Job) -> bool:
    """Whether a server is on the rank's GPU."""
    return job.shares_gpus and not job.is_embedded and not job.is_cpu


def _nccl_bytes(job: Job) -> int:
    policy = job.policy
    sizes = (
        policy.tensor_parallel,
        policy.context_parallel,
        policy.pipeline_parallel,
        job.data_parallel,
    )
    groups = sum(size > 1 for size in sizes) + (not job.is_embedded)
    return groups * GROUP_BYTES + (ALL_TO_ALL_BYTES if policy.expert_parallel > 1 else 0)


def _moments(
    job: Job, lasting: States, passing: Activations
) -> Iterator[tuple[str, Mapping[str, int]]]:
    second = lasting.gradients if job.replay_keeps_gradient else 0
    own = {"activations": passing.kept, passing.binds: passing.work, "second gradient": second}
    yield "training", own
    if job.is_cpu:
        copied = _copied_gradients(job.policy, job.trainer_gpus, lasting)
        yield "the gradients' reduction", {"copied gradients": copied + second}
    if job.has_reference and not job.is_cpu:
        own = {"reference weights": lasting.weights, "a forward pass": passing.forward}
        yield "the reference's pass", own
    if job.is_embedded:
        return
    share = round(job.engine_memory_fraction * job.chip.memory_bytes)
    beside = {"engine on this GPU": share} if _shares_its_gpu(job) else {}
    each = WEIGHT_BYTES[job.policy.precision]
    gathered = 0
    if job.weight_sync.transport != "sharded":
        gathered = 2 * each * job.shape.vocab_size * job.shape.hidden_size
    buckets = {"buckets": 2 * job.weight_sync.bucket_bytes, "a gathered tensor": gathered}
    yield "the weight update", beside | buckets


def _host(job: Job, lasting: States) -> int:
    """Bytes of the host's memory that a GPU's rank needs; the embedded engine is on rank 0's."""
    reference = lasting.weights if job.has_reference else 0
    return lasting.host + reference + (sum(embedded_bytes(job)) if job.is_embedded else 0)
