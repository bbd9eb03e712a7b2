"""A run as the planner sees it: model, settings, machines and lengths as plain numbers."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from megatron_spear.cluster.planner.chips import CHIPS, Chip, cpu_rank
from megatron_spear.config.rollout import RolloutSection, WeightSyncSection
from megatron_spear.config.schema import PolicySection, RunConfig
from megatron_spear.conversion.shape import ModelShape

MEAN_LENGTH_SHARE = 0.5
"""Mean length of a context, as a share of ``rollout.max_context``, where none is given."""
LENGTH_SPREAD = 1.0
"""Standard deviation of the logarithm of lengths: half of them within a factor of 2 of the median,
one in a hundred ten times as long, before the cut at the longest (docs/planner-times.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of one context (a segment of a trajectory), and contexts of a trajectory.

    Example: with ``max_context`` 512, ``max_new_tokens`` 10 and 20 turns in one growing context the
    mean is 256 tokens, of which 200 are sampled, and the prompt is what is left.
    """

    mean: int
    """Mean tokens of a context: prompt, observations and answers."""
    longest: int
    """Most tokens of a context (``rollout.max_context``)."""
    sampled: int
    """Mean tokens of a context that the policy sampled."""
    turns: int
    """Mean turns of a context, each one request to an engine."""
    contexts: int
    """Contexts of a trajectory: 1, or one a turn where ``env.history`` is a window (or
    ``rendered``: the most it can have)."""
    spread: float
    """Standard deviation of the logarithm of sampled tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """All the planner needs to know of a run."""

    shape: ModelShape
    policy: PolicySection
    rollout: RolloutSection
    weight_sync: WeightSyncSection
    chip: Chip
    gpus_per_node: int
    """0 = CPU ranks."""
    node_gpus: int
    """GPUs of all nodes together."""
    trainer_gpus: int
    """GPUs (or CPU ranks) that train: the world size."""
    engine_gpus: int
    """GPUs that generate; with ``shares_gpus`` they are among those that train."""
    engine_tensor_parallel: int
    engine_memory_fraction: float
    """Share of a GPU's memory that a server takes for weights and KV cache."""
    shares_gpus: bool
    """Engines are on GPUs that train (colocated, or the embedded one, which is on rank 0)."""
    lengths: Lengths
    recomputes_old_logprobs: bool
    """A forward pass for the ratio's denominator (``algorithm.old_logprobs: policy``)."""
    has_reference: bool
    """A forward pass of a reference policy, kept on the host (``algorithm.kl.coef`` > 0)."""
    mini_batches: int
    """Optimizer steps on new trajectories a trainer step."""
    trained_fraction: float
    """Share of the step's trajectories that are trained (``algorithm.keep_groups_fraction``)."""
    replayed_trajectories: int
    """Trajectories replayed in a step once replay is warm; 0 without replay."""
    replay_needs_logprobs: bool
    """Replayed rows get a forward pass of the present policy first (covariance clipping, ratio
    filter)."""
    replay_keeps_gradient: bool
    """One more gradient is held (``replay.gradient_norms``)."""

    @property
    def is_cpu(self) -> bool:
        """Ranks are processes of CPUs."""
        return self.gpus_per_node == 0

    @property
    def is_embedded(self) -> bool:
        """The engine is in rank 0's process, on the CPU."""
        return self.rollout.engine == "embedded"

    @property
    def data_parallel(self) -> int:
        """Replicas of the model that train."""
        policy = self.policy
        replica = policy.tensor_parallel * policy.context_parallel * policy.pipeline_parallel
        return self.trainer_gpus // replica

    @property
    def num_engines(self) -> int:
        """Engine replicas."""
        return max(self.engine_gpus // self.engine_tensor_parallel, 1)

    @property
    def num_gpus(self) -> int:
        """All GPUs."""
        return self.trainer_gpus + (0 if self.shares_gpus else self.engine_gpus)

    @property
    def trajectories(self) -> int:
        """Trajectories a step."""
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def trained_trajectories(self) -> int:
        """New trajectories a step that are trained."""
        return max(round(self.trajectories * self.trained_fraction), 1)

    @property
    def microbatches(self) -> int:
        """Micro-batches of an optimizer step on each data-parallel rank, about; at least 1."""
        rows = self.trained_trajectories / self.mini_batches + self.replayed_trajectories
        tokens = rows * self.lengths.contexts * self.lengths.mean
        each = tokens / self.data_parallel / self.policy.tokens_per_microbatch
        return max(ceil(each), 1)

    def with_policy(self, **changes: Any) -> "Job":
        """The same run with another layout."""
        return replace(self, policy=self.policy.model_copy(update=changes))

    @classmethod
    def of_config(
        cls, config: RunConfig, shape: ModelShape, *, mean_length: int | None = None
    ) -> "Job":
        """The run that ``config`` describes, of a model of this shape.

        Args:
            config: the run; ``cluster.*`` are its machines.
            shape: the model.
            mean_length: mean tokens of a context; None = half of ``rollout.max_context``.
        """
        cluster, rollout, algorithm = config.cluster, config.rollout, config.algorithm
        on_cpu, embedded = cluster.gpus_per_node == 0, rollout.engine == "embedded"
        tensor = 1 if embedded else cluster.servers.tensor_parallel
        return cls(
            shape=shape,
            policy=config.policy,
            rollout=rollout,
            weight_sync=config.weight_sync,
            chip=cpu_rank(cluster.ranks_on_a_node) if on_cpu else CHIPS[cluster.chip],
            gpus_per_node=cluster.gpus_per_node,
            node_gpus=cluster.num_nodes * cluster.gpus_per_node,
            trainer_gpus=cluster.world_size,
            engine_gpus=1 if embedded else _servers(config) * tensor,
            engine_tensor_parallel=tensor,
            engine_memory_fraction=cluster.servers.memory_fraction,
            shares_gpus=embedded or rollout.colocated,
            lengths=_lengths(config, mean_length),
            recomputes_old_logprobs=algorithm.old_logprobs == "policy",
            has_reference=algorithm.kl.coef > 0,
            mini_batches=algorithm.mini_batches,
            trained_fraction=algorithm.keep_groups_fraction,
            replayed_trajectories=_replayed(config),
            replay_needs_logprobs=_replay_needs_logprobs(config),
            replay_keeps_gradient=config.replay.enabled and config.replay.gradient_norms,
        )


def _servers(config: RunConfig) -> int:
    """Servers: those that are started, or those that are named (a router's URL counts as one)."""
    cluster = config.cluster
    return max(cluster.servers.count or len(config.rollout.servers), 1)


def _lengths(config: RunConfig, mean_length: int | None) -> Lengths:
    rollout, env = config.rollout, config.env
    mean = mean_length or max(round(MEAN_LENGTH_SHARE * rollout.max_context), 1)
    mean = min(mean, rollout.max_context)
    one_context = env.history == "full"
    turns = env.max_turns if one_context else 1
    return Lengths(
        mean=mean,
        longest=rollout.max_context,
        sampled=max(min(turns * rollout.max_new_tokens, mean - 1), 1),
        turns=turns,
        contexts=1 if one_context else env.max_turns,
        spread=LENGTH_SPREAD,
    )


def _replayed(config: RunConfig) -> int:
    """Bursts release a whole buffer, but only each ``1.5 capacity`` trajectories; continuous replay
    a fixed number."""
    replay = config.replay
    if not replay.enabled:
        return 0
    if replay.release == "continuous" and config.algorithm.compat == "corrected":
        return min(replay.rows_per_step, replay.capacity)
    return min(replay.capacity, config.rollout.prompts_per_step * config.rollout.group_size)


def _replay_needs_logprobs(config: RunConfig) -> bool:
    replay = config.replay
    return replay.enabled and (replay.ratio_filter is not None or replay.loss.type == "clip_cov")
