"""The random generators of a rank in checkpoints: torch's on CPU and GPU, and Megatron's by name.

Nothing is drawn from them in training today (no dropout), and what the control side draws is keyed
by its place in the run. They are stored for each (pipeline, tensor, data) rank, as Megatron-LM
does, and mean something at the same layout only; at another one all are seeded anew.
"""

import logging
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_spear.policy.parallel import ParallelContext, seed_generators

logger = logging.getLogger(__name__)


def layout(ctx: ParallelContext) -> dict[str, int]:
    """What has to be the same for stored generators to be taken back."""
    return {
        "pipeline": ctx.pipeline_size,
        "tensor": ctx.tensor_size,
        "context": ctx.context_size,
        "data": ctx.data_size,
        "expert": ctx.expert_size,
    }


def sharded_state(ctx: ParallelContext) -> ShardedObject:
    """This rank's generators, to store or to ask for."""
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    replicas = ctx.data_size * ctx.context_size
    return ShardedObject(
        "rng_state",
        state,
        (ctx.pipeline_size, ctx.tensor_size, replicas),
        (ctx.pipeline_rank, ctx.tensor_rank, ctx.rank // ctx.tensor_size % replicas),
    )


def restore(state: dict[str, Any]) -> None:
    """Take over what ``sharded_state`` asked for and has been loaded."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def seed_anew(stored: dict[str, int] | None, ctx: ParallelContext) -> None:
    """Seed as at the start of a run; ``stored`` is the checkpoint's layout, None if it has none."""
    where = "the checkpoint has no random generators"
    if stored is not None:
        where = f"the checkpoint's random generators are of the layout {stored}"
    logger.info("%s, this is %s; they are seeded anew from run.seed", where, layout(ctx))
    seed_generators(ctx.seed)
