"""FP8 as Megatron's settings, and weights held in FP8 as plain tensors.

A weight held in FP8 passes for a bf16 tensor: copying into it rounds, and everything that leaves
the policy (Hugging Face weights, checkpoints) is dequantized first. The optimizer keeps float32
weights.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from megatron_spear.config.schema import Fp8Section

BLOCKS = ("blockwise", "mxfp8")


def number_format(fp8: Fp8Section) -> str:
    """The format in use: as set, or what TransformerEngine takes for the recipe."""
    return fp8.format or ("e4m3" if fp8.recipe in BLOCKS else "hybrid")


def config_fields(fp8: Fp8Section) -> dict[str, Any]:
    """What ``TransformerConfig`` needs."""
    if fp8.recipe == "none":
        return {}
    return {
        "fp8": number_format(fp8),
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.parameters,
        "first_last_layers_bf16": fp8.bf16_layers_at_start + fp8.bf16_layers_at_end > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_layers_at_start,
        "num_layers_at_end_in_bf16": fp8.bf16_layers_at_end,
    }


def plain(tensor: Tensor) -> Tensor:
    """The tensor itself, or if it is held in FP8 its values in the dtype it passes for."""
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


def make_plain(sharded_state: Any) -> None:
    """Replace tensors held in FP8 in a sharded state dict."""
    for entry in nested_values(sharded_state):
        if isinstance(getattr(entry, "data", None), Tensor):
            entry.data = plain(entry.data)


def keep_exact(parameter: torch.nn.Parameter, values: Tensor) -> None:
    """Let the optimizer begin with the values that were loaded, not with what FP8 left of them.

    Megatron asks a parameter held in FP8 for these when it makes the float32 weights, once.
    """
    if not is_float8tensor(parameter):
        return
    if hasattr(parameter, "clear_high_precision_init_val"):
        parameter.clear_high_precision_init_val()  # of the values it was made with
    exact = values.to(parameter.dtype)
    parameter.get_high_precision_init_val = lambda: exact

    def clear() -> None:
        del parameter.get_high_precision_init_val
        del parameter.clear_high_precision_init_val

    parameter.clear_high_precision_init_val = clear
