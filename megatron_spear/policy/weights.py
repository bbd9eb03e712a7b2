"""Hugging Face weights into and out of the distributed model, one parameter at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.hf_io import HfReader, check_complete
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import CheckpointError
from megatron_spear.policy.parallel import ParallelContext, Place


def load_hf(model: Any, path: Path, shape: ModelShape, ctx: ParallelContext) -> None:
    """Copy the folder's weights into this rank's part of the model.

    Each rank maps the files and reads only tensors of its own stage. Raises CheckpointError for
    tensors that are missing, of a wrong shape or left over, and for parameters that none sets.
    """
    parameters = dict(model.named_parameters())
    unset = set(parameters)
    with HfReader(path) as reader, torch.no_grad():
        table = weight_table(shape)
        check_complete(reader, table)
        for item in table:
            name = item.local_name(model.first_layer, model.first_expert)
            if not is_here(item, shape, ctx) or name not in parameters:
                continue
            sources = [
                reader.get(source, expected)
                for source, expected in zip(item.sources, item.shapes, strict=True)
            ]
            part = item.to_megatron(sources)
            if item.expert is None:
                part = item.shard(part, ctx.tensor_rank, ctx.tensor_size)
            if part.shape != parameters[name].shape:
                raise CheckpointError(
                    f"{name} became {tuple(part.shape)} from {', '.join(item.sources)}; the model "
                    f"expects {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(part)
            unset.discard(name)
    if unset:
        raise CheckpointError(f"no tensor of {path} sets {', '.join(sorted(unset))}")


def export_hf(
    model: Any, shape: ModelShape, ctx: ParallelContext
) -> Iterator[tuple[str, Tensor | None]]:
    """Whole Hugging Face tensors by name: ``(name, tensor)`` on rank 0, ``(name, None)`` elsewhere.

    Collective: every rank has to run the iterator to its end. One parameter is gathered at a time:
    within the tensor-parallel group that holds it, if it is split, then from the first rank that
    has it to rank 0. Tied output
    embeddings are not repeated. Tensors may share memory with the model: copy what is kept.
    """
    parameters = dict(model.named_parameters())
    for item in weight_table(shape):
        if item.tied:
            continue
        part = None
        if is_here(item, shape, ctx):
            part = parameters[item.local_name(model.first_layer, model.first_expert)].detach()
        holder = _first_holder(item, shape, ctx)
        full = _to_controller(item, part, holder, ctx, model.config.params_dtype)
        if full is None:
            yield from ((name, None) for name in item.sources)
            continue
        tensors = item.to_hf(full)
        yield from zip(item.sources, (t.contiguous() for t in tensors), strict=True)


def stage_of(item: WeightMap, shape: ModelShape, ctx: ParallelContext | Place) -> int:
    """The pipeline rank that holds the parameter."""
    if item.stage == "layer":
        return item.layer // (shape.num_layers // ctx.pipeline_size)
    return 0 if item.stage == "first" else ctx.pipeline_size - 1


def _expert_rank_of(item: WeightMap, shape: ModelShape, ctx: ParallelContext | Place) -> int:
    """The expert-parallel rank that holds the expert."""
    assert item.expert is not None
    return item.expert // (shape.num_experts // ctx.expert_size)


def is_here(item: WeightMap, shape: ModelShape, ctx: ParallelContext | Place) -> bool:
    """Whether this rank holds the parameter, or its part of it."""
    if stage_of(item, shape, ctx) != ctx.pipeline_rank:
        return False
    return item.expert is None or _expert_rank_of(item, shape, ctx) == ctx.expert_rank


def _first_holder(item: WeightMap, shape: ModelShape, ctx: ParallelContext) -> int:
    """The lowest global rank that holds the parameter."""
    first = stage_of(item, shape, ctx) * ctx.tensor_size * ctx.data_size
    return first if item.expert is None else first + _expert_rank_of(item, shape, ctx)


def _to_controller(
    item: WeightMap, part: Tensor | None, holder: int, ctx: ParallelContext, dtype: torch.dtype
) -> Tensor | None:
    """Gather a parameter's shards on rank 0 (None elsewhere)."""
    full = part
    if part is not None and item.expert is None and ctx.data_rank == 0:
        shards = [part]
        if ctx.tensor_size > 1:
            shards = [torch.empty_like(part) for _ in range(ctx.tensor_size)]
            dist.all_gather(shards, part.contiguous(), group=ctx.tensor)
        full = item.unshard(shards) if ctx.tensor_rank == 0 else None
    if holder == 0:
        return full if ctx.is_controller else None
    if ctx.rank == holder:
        assert full is not None
        dist.send(full.to("cpu").contiguous(), dst=0, group=ctx.control)
    if not ctx.is_controller:
        return None
    full = torch.empty(item.full_shape, dtype=dtype)
    dist.recv(full, src=holder, group=ctx.control)
    return full
