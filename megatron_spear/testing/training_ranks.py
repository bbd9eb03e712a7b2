"""A training rank's weights without a policy: cut from whole tensors as Megatron holds them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import place_of
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.slices import TensorSlice, slices_of
from megatron_spear.weight_sync.layouts import TrainingLayout


def random_weights(
    shape: ModelShape, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Whole tensors by Hugging Face name."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=draw).to(dtype)
        for item in weight_table(shape)
        if not item.tied
        for name, size in zip(item.sources, item.shapes, strict=True)
    }


def rank_slices(
    weights: Mapping[str, Tensor], shape: ModelShape, layout: TrainingLayout, rank: int
) -> tuple[TensorSlice, ...]:
    """What ``policy.local_slices`` gives on a rank."""
    stage, within = divmod(rank, layout.stage_size)
    own, size = within % layout.tensor, layout.tensor
    found: list[TensorSlice] = []
    for item in weight_table(shape):
        place, _ = place_of(item, shape.num_layers, layout.pipeline, layout.virtual)
        if item.tied or place != stage:
            continue
        sources = [weights[name] for name in item.sources]
        if item.expert is None:
            part = item.part(sources, own, size).clone()
        elif item.expert // (shape.num_experts // layout.expert) == within % layout.expert:
            part = item.to_megatron(sources).clone()
        else:
            continue
        found += slices_of(item, lambda part=part: part, part.dtype, own, size)  # type: ignore[misc]
    return tuple(found)
