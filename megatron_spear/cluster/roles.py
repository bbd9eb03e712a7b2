"""Who does what: trainer nodes first, engine nodes after, each with its share of the servers.

trainer_nodes=2, engine_nodes=2, servers.count=3      trainer_nodes=1, servers.count=2
node 0  trainer                                       node 0  trainer, engines 0 1
node 1  trainer
node 2  engines 0 1
node 3  engine 2
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_spear.config.check import check_config
from megatron_spear.config.cluster import ClusterSection
from megatron_spear.config.layout import ranks_of_a_replica
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import ConfigError

PROGRAMS = {"serve": "sglang", "sglang": "sglang", "vllm": "vllm"}
"""The ``rollout.engine`` that speaks to each ``cluster.servers.program``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRoles:
    """What runs on one node: trainer ranks, and numbers of servers and environment workers that
    count through the whole run."""

    num_ranks: int
    engines: range
    environments: range


def roles_of(cluster: ClusterSection, node: int) -> NodeRoles:
    """The roles of node ``node``, 0 the first."""
    assert 0 <= node < cluster.num_nodes, "the node is one of the job's"
    trains = node < cluster.trainer_nodes
    sharers = cluster.engine_nodes or cluster.trainer_nodes
    place = node - (cluster.trainer_nodes if cluster.engine_nodes else 0)
    return NodeRoles(
        num_ranks=cluster.ranks_on_a_node if trains else 0,
        engines=_share(cluster.servers.count, sharers, place),
        environments=_share(cluster.env_workers, sharers, place),
    )


def _share(count: int, sharers: int, place: int) -> range:
    """The part of ``range(count)`` of one of ``sharers``, the first ones getting one more where it
    does not divide; nothing for a negative place.

    Example: 3 over 2 are ``range(0, 2)`` and ``range(2, 3)``.
    """
    if place < 0:
        return range(0)
    each, more = divmod(count, sharers)
    first = place * each + min(place, more)
    return range(first, first + each + (place < more))


def first_server_gpu(cluster: ClusterSection, colocated: bool) -> int:
    """The first GPU of a node that servers may have: after the ranks' own, unless they share."""
    return 0 if colocated or cluster.engine_nodes else cluster.ranks_on_a_node


def role_problems(config: RunConfig) -> Iterator[str]:
    """One line for each way in which the roles do not fit the machines or the run."""
    cluster, servers = config.cluster, config.cluster.servers
    if cluster.gpus_per_node and (cluster.ranks_per_node or 0) > cluster.gpus_per_node:
        yield (
            f"cluster.ranks_per_node={cluster.ranks_per_node} is above "
            f"cluster.gpus_per_node={cluster.gpus_per_node}: a rank has a GPU of its own"
        )
    yield from _shared_gpu_problems(config)
    if not servers.count:
        if cluster.engine_nodes:
            yield (
                f"cluster.engine_nodes={cluster.engine_nodes} with cluster.servers.count=0 leaves "
                "these nodes nothing to do; set one of them"
            )
        return
    yield from _program_problems(config)
    if config.rollout.colocated and cluster.engine_nodes:
        yield (
            "rollout.colocated=true is for servers on the GPUs that train, and "
            f"cluster.engine_nodes={cluster.engine_nodes} puts them elsewhere; change one"
        )
    if not cluster.gpus_per_node:
        return
    sharers = cluster.engine_nodes or cluster.trainer_nodes
    first = first_server_gpu(cluster, config.rollout.colocated)
    needed = len(_share(servers.count, sharers, 0)) * servers.tensor_parallel
    if first + needed > cluster.gpus_per_node:
        ranks = f", of which training has {first}" if first else ""
        yield (
            f"cluster.servers.count={servers.count} of {servers.tensor_parallel} GPU(s) need "
            f"{needed} GPUs a node, and cluster.gpus_per_node={cluster.gpus_per_node}{ranks}; "
            "use fewer servers, fewer ranks a node, or more engine nodes"
        )


def _shared_gpu_problems(config: RunConfig) -> Iterator[str]:
    """NCCL refuses a group with two ranks on one GPU, such as rank 0 and a server's beside it; and
    a server that is started sees its own GPUs only, of which rank 0's may be none."""
    transport, servers = config.weight_sync.transport, config.cluster.servers
    if not (config.rollout.colocated and config.cluster.gpus_per_node) or transport == "disk":
        return
    if transport != "ipc":
        yield (
            f"rollout.colocated=true with weight_sync.transport={transport}: NCCL has no group of "
            "a trainer rank and a server on the same GPU; set weight_sync.transport=disk"
        )
    elif servers.count > 1:
        yield (
            f"rollout.colocated=true with weight_sync.transport=ipc: of "
            f"cluster.servers.count={servers.count} servers only the first sees the GPU of rank 0; "
            "set weight_sync.transport=disk"
        )


def require_settings(config: RunConfig) -> None:
    """ConfigError with every combination that cannot work, on the machines of ``cluster.*`` where
    they have GPUs, else on as few CPU ranks as a replica of the model needs."""
    ranks = ranks_of_a_replica(config.policy)
    if config.cluster.gpus_per_node:
        ranks = config.cluster.world_size
    problems = [*check_config(config, ranks), *role_problems(config)]
    if problems:
        raise ConfigError("these settings cannot work:\n" + "\n".join(f"  {p}" for p in problems))


def _program_problems(config: RunConfig) -> Iterator[str]:
    servers, engine = config.cluster.servers, config.rollout.engine
    if engine != PROGRAMS[servers.program]:
        yield (
            f"cluster.servers.program={servers.program} goes with "
            f"rollout.engine={PROGRAMS[servers.program]}, and it is {engine}; change one"
        )
    if config.rollout.servers:
        yield (
            f"cluster.servers.count={servers.count} starts servers, and rollout.servers names "
            f"{len(config.rollout.servers)} others; set one of them"
        )
    if servers.program == "serve" and servers.tensor_parallel > 1:
        yield (
            f"cluster.servers.tensor_parallel={servers.tensor_parallel}: megatron-spear serve has "
            "one rank; use 1, or another program"
        )
    if servers.start_deadline_s >= config.run.hang_limit_s:
        yield (
            f"cluster.servers.start_deadline_s={servers.start_deadline_s:g} is not below "
            f"run.hang_limit_s={config.run.hang_limit_s:g}, for which other ranks wait meanwhile; "
            "lower the first or raise the second"
        )
    fp8 = config.weight_sync.precision == "fp8"
    if fp8 and servers.program != "serve" and config.weight_sync.transport == "disk":
        yield (
            f"weight_sync.precision=fp8 with transport=disk: {servers.program} starts from an FP8 "
            "folder only, and launch has none; use another transport, or start the servers "
            "yourself (rollout.servers)"
        )
