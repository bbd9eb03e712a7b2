"""Work out to the ranks, results back: Python objects over the gloo control group."""

from typing import Any

import torch.distributed as dist

from megatron_spear.data.packing import PackedStep, TrainBatch
from megatron_spear.data.zigzag import part_of
from megatron_spear.errors import ConfigError
from megatron_spear.policy.parallel import ParallelContext


def scatter(
    packed: PackedStep | None, message: Any, ctx: ParallelContext
) -> tuple[tuple[TrainBatch, ...], Any]:
    """This rank's micro-batches and the controller's ``message`` (small, picklable).

    Collective. The controller passes both; what other ranks pass is not looked at. All ranks of a
    data-parallel replica get the same micro-batches, and of each their context-parallel rank's
    tokens are kept.
    """
    if ctx.is_controller:
        if packed is None:
            raise ConfigError("the controller (rank 0) got no packed step; only others pass None")
        if len(packed.micro_batches) != ctx.data_size:
            raise ConfigError(
                f"the step is packed for {len(packed.micro_batches)} data-parallel ranks, the "
                f"layout has {ctx.data_size}; pass data_parallel=ctx.data_size to pack"
            )
    if ctx.world_size == 1:
        assert packed is not None
        batches = packed.micro_batches[0]
    else:
        parcels: list[Any] | None = None
        if packed is not None and ctx.is_controller:
            parcels = [
                (packed.micro_batches[ctx.data_rank_of(rank)], message)
                for rank in range(ctx.world_size)
            ]
        received: list[Any] = [None]
        dist.scatter_object_list(received, parcels, src=0, group=ctx.control)
        batches, message = received[0]
    own = (part_of(batch, ctx.context_rank, ctx.context_size) for batch in batches)
    return tuple(batch.to(ctx.device) for batch in own), message


def gather(value: Any, ctx: ParallelContext) -> list[list[Any]] | None:
    """On the controller, for each data-parallel rank what its context-parallel ranks' speakers
    passed, in their order; else None.

    Collective. Only the values of ranks with ``ctx.speaks_for_its_tokens`` travel.
    """
    mine = (ctx.data_rank, ctx.context_rank, value) if ctx.speaks_for_its_tokens else None
    if ctx.world_size == 1:
        return [[value]]
    everything: list[Any] | None = [None] * ctx.world_size if ctx.is_controller else None
    dist.gather_object(mine, everything, dst=0, group=ctx.control)
    if everything is None:
        return None
    spoken = sorted((item for item in everything if item is not None), key=lambda item: item[:2])
    return [[item[2] for item in spoken if item[0] == rank] for rank in range(ctx.data_size)]


def all_sum(values: dict[str, float] | None, ctx: ParallelContext) -> dict[str, float]:
    """Sum per name over the data- and context-parallel ranks' speakers, on every rank.
    Collective."""
    everything: list[Any] = [values if ctx.speaks_for_its_tokens else None]
    if ctx.world_size > 1:
        mine, everything = everything[0], [None] * ctx.world_size
        dist.all_gather_object(everything, mine, group=ctx.control)
    total: dict[str, float] = {}
    for part in everything:
        for name, value in (part or {}).items():
            total[name] = total.get(name, 0.0) + value
    return total
