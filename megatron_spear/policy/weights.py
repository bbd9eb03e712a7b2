"""Hugging Face weights into and out of the distributed model, one parameter at a time."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.hf_io import HfReader, check_complete
from megatron_spear.conversion.mapping import Shape, WeightMap, place_of
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.slices import TensorSlice, slices_of
from megatron_spear.errors import CheckpointError
from megatron_spear.heartbeats.heart import beat
from megatron_spear.policy import fp8
from megatron_spear.policy.parallel import ParallelContext, Place

LOCAL_PREFIXES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""How names in a layer of TransformerEngine's begin, and how they do in a local one."""


def stored_prefixes(shape: ModelShape) -> dict[str, str]:
    """How names in a local layer begin, and how they do in checkpoints.

    These have TransformerEngine's names, as Megatron's own do, whichever layers wrote them.
    """
    dense = not shape.num_experts  # with experts the norm stays by itself there too
    return {
        local: prefix
        for prefix, local in LOCAL_PREFIXES.items()
        if dense or not prefix.startswith("mlp.")
    }


_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$")


def local_name(name: str) -> str:
    """A parameter's name in the local layers, which weight tables speak of, by its own.

    Example: TransformerEngine's ``mlp.experts.linear_fc1.weight3`` is
    ``mlp.experts.local_experts.3.linear_fc1.weight``; local names stay.
    """
    for prefix, local in LOCAL_PREFIXES.items():
        name = name.replace(prefix, local)
    return _GROUPED.sub(r"mlp.experts.local_experts.\2.\1.weight", name)


def parameters_of(chunk: Any) -> dict[str, torch.nn.Parameter]:
    """A piece of the model's parameters by local name."""
    return {local_name(name): parameter for name, parameter in chunk.named_parameters()}


def load_hf(chunks: Sequence[Any], path: Path, shape: ModelShape, ctx: ParallelContext) -> None:
    """Copy the folder's weights into this rank's pieces of the model.

    Each rank maps the files and reads only tensors of its own stage. Raises CheckpointError for
    tensors that are missing, of a wrong shape or left over, and for parameters that none sets.
    """
    named = [parameters_of(chunk) for chunk in chunks]
    unset = {(number, name) for number, own in enumerate(named) for name in own}
    with HfReader(path) as reader, torch.no_grad():
        table = weight_table(shape)
        check_complete(reader, table)
        for item in table:
            stage, number = place_of(item, shape.num_layers, ctx.pipeline_size, len(chunks))
            chunk, parameters = chunks[number], named[number]
            name = item.local_name(chunk.first_layer, chunk.first_expert)
            if not is_here(item, stage, shape, ctx) or name not in parameters:
                continue
            sources = [
                reader.get(source, expected)
                for source, expected in zip(item.sources, item.shapes, strict=True)
            ]
            split = ctx.tensor_size if item.expert is None else 1  # experts are whole
            part = item.part(sources, ctx.tensor_rank % split, split)
            if part.shape != parameters[name].shape:
                raise CheckpointError(
                    f"{name} became {tuple(part.shape)} from {', '.join(item.sources)}; the model "
                    f"expects {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(part)
            beat()
            fp8.keep_exact(parameters[name], part)
            unset.discard((number, name))
    if unset:
        names = ", ".join(sorted(name for _, name in unset))
        raise CheckpointError(f"no tensor of {path} sets {names}")


def export_hf(
    chunks: Sequence[Any], shape: ModelShape, ctx: ParallelContext
) -> Iterator[tuple[str, Tensor | None]]:
    """Whole Hugging Face tensors by name: ``(name, tensor)`` on rank 0, ``(name, None)`` elsewhere.

    Collective: every rank has to run the iterator to its end. One parameter is gathered at a time:
    within the tensor-parallel group that holds it, if it is split, then from the first rank that
    has it to rank 0. Tied output embeddings are not repeated. Tensors may share memory with the
    model: copy what is kept.
    """
    named = [parameters_of(chunk) for chunk in chunks]
    for item in weight_table(shape):
        if item.tied:
            continue
        stage, number = place_of(item, shape.num_layers, ctx.pipeline_size, len(chunks))
        part = None
        if is_here(item, stage, shape, ctx):
            chunk = chunks[number]
            name = item.local_name(chunk.first_layer, chunk.first_expert)
            part = fp8.plain(named[number][name].detach())
        holder = _first_holder(item, stage, shape, ctx)
        full = _to_controller(item, part, holder, ctx, chunks[0].config.params_dtype)
        if full is None:
            yield from ((name, None) for name in item.sources)
            continue
        tensors = item.to_hf(full)
        yield from zip(item.sources, (t.contiguous() for t in tensors), strict=True)


def local_slices(
    chunks: Sequence[Any], shape: ModelShape, ctx: ParallelContext
) -> tuple[TensorSlice, ...]:
    """What this rank holds of each Hugging Face tensor, in the order of the weight table.

    Nothing is copied or sent. Tied output embeddings are not repeated.
    """
    named = [parameters_of(chunk) for chunk in chunks]
    slices: list[TensorSlice] = []
    for item in weight_table(shape):
        stage, number = place_of(item, shape.num_layers, ctx.pipeline_size, len(chunks))
        if item.tied or not is_here(item, stage, shape, ctx):
            continue
        chunk = chunks[number]
        parameter = named[number][item.local_name(chunk.first_layer, chunk.first_expert)]
        values = partial(_values, parameter)
        slices += slices_of(item, values, parameter.dtype, ctx.tensor_rank, ctx.tensor_size)
    return tuple(slices)


def _values(parameter: torch.nn.Parameter) -> Tensor:
    return fp8.plain(parameter.detach())


def _expert_rank_of(item: WeightMap, shape: ModelShape, ctx: ParallelContext | Place) -> int:
    """The expert-parallel rank that holds the expert."""
    assert item.expert is not None
    return item.expert // (shape.num_experts // ctx.expert_size)


def is_here(item: WeightMap, stage: int, shape: ModelShape, ctx: ParallelContext | Place) -> bool:
    """Whether this rank holds the parameter of pipeline rank ``stage``, or its part of it."""
    if stage != ctx.pipeline_rank:
        return False
    return item.expert is None or _expert_rank_of(item, shape, ctx) == ctx.expert_rank


def local_shapes(shape: ModelShape, place: Place) -> dict[str, Shape]:
    """Shape of every Megatron parameter that a rank there holds, by its name there.

    Example: ``output_layer.weight`` of 50,257 x 8 on the last stage, tensor parallel 2: (25129, 8).
    """
    first_layer = shape.num_layers // place.pipeline_size * place.pipeline_rank
    first_expert = shape.num_experts // place.expert_size * place.expert_rank
    found: dict[str, Shape] = {}
    for item in weight_table(shape):
        copied = item.tied and place.pipeline_size == 1  # one stage has the embedding itself
        stage, _ = place_of(item, shape.num_layers, place.pipeline_size)
        if copied or not is_here(item, stage, shape, place):
            continue
        sources = [torch.empty(size, device="meta") for size in item.shapes]
        split = place.tensor_size if item.expert is None else 1  # experts are whole
        part = item.part(sources, place.tensor_rank % split, split)
        found[item.local_name(first_layer, first_expert)] = tuple(part.shape)
    return found


def _first_holder(item: WeightMap, stage: int, shape: ModelShape, ctx: ParallelContext) -> int:
    """The lowest global rank that holds the parameter of pipeline rank ``stage``."""
    first = stage * (ctx.world_size // ctx.pipeline_size)
    return first if item.expert is None else first + _expert_rank_of(item, shape, ctx)


def _to_controller(
    item: WeightMap, part: Tensor | None, holder: int, ctx: ParallelContext, dtype: torch.dtype
) -> Tensor | None:
    """Gather a parameter's shards on rank 0 (None elsewhere)."""
    full = part
    first_copy = ctx.data_rank == 0 and ctx.context_rank == 0
    if part is not None and item.expert is None and first_copy and ctx.tensor_size > 1:
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
