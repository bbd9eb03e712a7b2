"""What Megatron's distributed optimizer does with weights held in FP8."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..rounding import scales_of
from . import QuantizedTensor


def replace_raw_data(tensor: QuantizedTensor, new_raw_data: Tensor) -> None:
    """Move what is held into a buffer's place."""
    tensor = tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
    if tensor.recipe.mxfp8():
        raise NotImplementedError("replace_raw_data for MXFP8 is not supported")
    new_raw_data.detach().copy_(tensor.held["data"])
    tensor.held["data"] = new_raw_data


def cast_master_weights_to_fp8(
    model_weights: list[Any],
    master_weights: list[Tensor | None],
    start_offsets: list[int | None],
    group: Any,
    fsdp_shard_model_weights: Any = None,
    manual_post_all_gather_processing: bool = False,
) -> None:
    """Round this rank's piece of each weight; scales come from all pieces, by a collective. The
    backward pass's copies are left to ``post_all_gather_processing``."""
    assert manual_post_all_gather_processing, "as Megatron asks for it"
    for weight, master, start in zip(model_weights, master_weights, start_offsets, strict=True):
        whole = torch.zeros(weight.numel())
        begin = start or 0
        if master is not None:
            whole[begin : begin + master.numel()] = master.flatten().to(weight.dtype).float()
        whole = whole.view(weight.shape)
        scales = scales_of(whole, weight.recipe, weight=True)
        dist.all_reduce(scales, op=dist.ReduceOp.MIN, group=group)
        if master is None:
            weight.held["scales"] = scales
            continue
        mine = QuantizedTensor(
            weight.shape,
            weight.dtype,
            weight.recipe,
            {"data": torch.empty(weight.shape, dtype=torch.uint8)},
        )
        mine.write_(whole, scales)
        place = slice(begin, begin + master.numel())
        weight.held["data"].view(-1)[place] = mine.held["data"].view(-1)[place]
        weight.held["scales"] = scales


def post_all_gather_processing(model_weights: Any) -> None:
    """Make the backward pass's copies from what was gathered."""
    for weight in model_weights if isinstance(model_weights, list) else [model_weights]:
        weight.renew_columns()
