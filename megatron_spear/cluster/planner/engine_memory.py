"""What an engine server's GPUs hold: weights, and keys and values in what is left of its share.

SGLang's ``--mem-fraction-static`` is the share of a GPU for weights and KV cache; CUDA graphs and
activations are in the rest. vLLM's ``--gpu-memory-utilization`` has its activations in the share
too, so of a share near 1 its cache is smaller than here. Weights are split over the server's ranks;
of fewer key-value groups than ranks each rank has one group whole. Sources: SGLang's and vLLM's
documentation of the two arguments; bytes of keys and values from PagedAttention (arXiv 2309.06180,
section 3): 2 x layers x groups x head size x 2 bytes a token.
"""

from dataclasses import dataclass

from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.states import WEIGHT_BYTES
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import model_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """Of each GPU of a server, in bytes; ``tokens`` are those of all its contexts together."""

    share: int
    """What the server takes."""
    weights: int
    a_token: int
    """Keys and values of a token."""
    longest: int
    """Tokens of the longest context."""
    wanted: int
    """Contexts it is asked to hold at once."""

    @property
    def cache(self) -> int:
        """For keys and values."""
        return max(self.share - self.weights, 0)

    @property
    def tokens(self) -> int:
        """That the cache holds."""
        return self.cache // self.a_token

    @property
    def contexts(self) -> int:
        """Contexts of the longest kind that the cache holds."""
        return self.tokens // self.longest

    @property
    def fits(self) -> bool:
        """Whether it can generate at all."""
        return self.contexts >= 1

    @property
    def short(self) -> int:
        """Bytes that are missing for one context; 0 where it fits."""
        return max(self.weights + self.longest * self.a_token - self.share, 0)


def engine_memory(job: Job) -> EngineMemory:
    """Of a server on GPUs."""
    tensor, rollout = job.engine_tensor_parallel, job.rollout
    share = round(job.engine_memory_fraction * job.chip.memory_bytes)
    asked = -(-min(rollout.max_slots, job.trajectories) // job.num_engines)
    return EngineMemory(
        share=share,
        weights=engine_weights(job.shape, fp8=job.weight_sync.precision == "fp8") // tensor,
        a_token=cache_bytes(job.shape, tensor),
        longest=rollout.max_context,
        wanted=min(asked, rollout.max_requests_per_server),
    )


def engine_weights(shape: ModelShape, *, fp8: bool) -> int:
    """All ranks' weights: bf16, or linear layers in FP8 with a float32 scale for 128 x 128."""
    own = model_parameters(shape)
    if not fp8:
        return 2 * own.total
    linears = own.linears + own.experts
    return 2 * own.rest + linears + 4 * linears // 128**2


def cache_bytes(shape: ModelShape, tensor: int = 1, each: int = 2) -> int:
    """Keys and values of a token on one of so many ranks, ``each`` bytes a number.

    Example: Qwen2.5-7B, 28 layers of 4 groups of 128: 57,344 bytes; over 4 ranks 14,336.
    """
    groups = max(shape.num_groups // tensor, 1)
    return 2 * each * shape.num_layers * groups * shape.head_dim


def embedded_bytes(job: Job) -> tuple[int, int]:
    """(weights, keys and values) of the embedded engine, in the memory of rank 0's host.

    Matrices in fp32 are held twice, once as oneDNN reads them (``rollout/engines/linear.py``; those
    above 64 MiB are not, which is not counted).
    """
    each, own = WEIGHT_BYTES[job.policy.precision], model_parameters(job.shape)
    twice = own.linears + own.experts if job.policy.precision == "fp32" else 0
    tokens = job.rollout.max_slots * job.rollout.max_context
    return each * (own.total + twice), tokens * cache_bytes(job.shape, each=each)
