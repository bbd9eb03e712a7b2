"""Weights in FP8 with a scale for each block of 128 x 128, as DeepSeek-V3 is published.

Beside ``NAME.weight`` (e4m3) stands ``NAME.weight_scale_inv`` (float32, one value a block), and a
weight is its e4m3 value times its block's. SGLang, vLLM and transformers load this by the
``quantization_config`` given here. Linear layers of the decoder are stored so; embedding, output
layer, norms, biases and routers stay as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_spear.conversion import fp8_format
from megatron_spear.conversion.mapping import Shape, WeightMap
from megatron_spear.errors import CheckpointError

BLOCK, CONFIG = fp8_format.BLOCK, fp8_format.CONFIG
LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST = 2.0**-9
"""Of e4m3: 448 and its smallest number above 0."""
SCALE = "_scale_inv"
_ROWS, _ROWS_ON_GPU = BLOCK, 64 * BLOCK
"""Rows worked on at a time: on a CPU what its cache holds, on a GPU what keeps it busy."""


def is_quantized(item: WeightMap) -> bool:
    """Whether the export stores the parameter's tensors in FP8."""
    module = item.target.removesuffix(".weight").rpartition(".")[2]
    return item.target.endswith(".weight") and module.startswith("linear_")


def scale_shape(shape: Shape) -> Shape:
    """Blocks of a weight, those at the edges cut short: ``(300, 128)`` has ``(3, 1)``."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 ``[R, C]``, float32 scales ``[ceil(R / 128), ceil(C / 128)]``) on the weight's device.

    Example: a block whose largest magnitude is 4.48 has scale 0.01; its 1.0 is stored as 96
    (100 rounded) and reads 0.96.
    """
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = weight.new_ones(scale_shape(tuple(weight.shape)), dtype=torch.float32)
    for rows, blocks in _stripes(weight):
        stripe = _padded(weight[rows])
        split = stripe.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        largest = split.abs().amax((1, 3))
        scales[blocks] = torch.where(largest > 0, largest / LARGEST, 1.0)
        split /= scales[blocks, None, :, None]
        stripe.clamp_(-LARGEST, LARGEST)
        values[rows] = stripe[: len(values[rows]), : weight.shape[1]]
    return values, scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[R, C]`` again."""
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    for rows, blocks in _stripes(values):
        stripe = _padded(values[rows])
        split = stripe.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        split *= scales[blocks, None, :, None]
        result[rows] = stripe[: len(result[rows]), : values.shape[1]]
    return result


def check(name: str, weight: Tensor, values: Tensor, scales: Tensor) -> None:
    """CheckpointError if the stored weight is further from ``weight`` than rounding explains.

    e4m3 has 3 bits after the leading one, so a number is off by at most 1/16 of itself, or by half
    the smallest number times the scale.
    """
    if tuple(scales.shape) != scale_shape(tuple(weight.shape)):
        raise CheckpointError(
            f"{name}{SCALE} has shape {tuple(scales.shape)}; expected "
            f"{scale_shape(tuple(weight.shape))} for a weight of {tuple(weight.shape)}"
        )
    for rows, blocks in _stripes(weight):
        exact = weight[rows].float()
        off = (dequantize(values[rows], scales[blocks]) - exact).abs_()
        each = scales[blocks].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        floor = each[: exact.shape[0], : exact.shape[1]] * (_SMALLEST / 2)
        allowed = torch.maximum(exact.abs() / 16, floor) * (1 + 1e-5)
        if not bool((off <= allowed).all()):
            raise CheckpointError(
                f"{name} in FP8 is off by up to {off.max().item():.3g} from the weight it was made "
                f"of (largest {exact.abs().max().item():.3g}), which is more than rounding"
            )


def _stripes(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows worked on together, and their blocks."""
    num_rows = matrix.shape[0]
    step = _ROWS if matrix.device.type == "cpu" else _ROWS_ON_GPU
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))


def _padded(stripe: Tensor) -> Tensor:
    """In float32, with zeros up to whole blocks; always memory of its own."""
    rows, columns = (-size % BLOCK for size in stripe.shape)
    copy = stripe.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return torch.nn.functional.pad(copy, (0, columns, 0, rows)) if rows or columns else copy
