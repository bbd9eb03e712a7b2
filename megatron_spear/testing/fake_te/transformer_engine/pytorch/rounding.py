"""Scales and rounding to float8, by recipe; every function takes ``[rows, columns]`` in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.recipe import Format, Recipe

_TINY = 1e-12


def scales_of(
    values: Tensor, recipe: Recipe, *, weight: bool = False, largest: float = 448.0
) -> Tensor:
    """What to multiply with so that the largest value of each block is ``largest``.

    One number for a recipe without blocks, else ``[rows, blocks]``, or ``[blocks, blocks]`` for a
    weight whose recipe has square blocks; a power of two where there are blocks.
    """
    amax = _blocks(values.abs(), recipe, weight)
    scales = largest / amax.clamp(min=_TINY)
    return scales if recipe.block is None else torch.exp2(scales.log2().floor())


def spread(scales: Tensor, shape: torch.Size, recipe: Recipe, *, weight: bool = False) -> Tensor:
    """The scale of each value."""
    if recipe.block is None:
        return scales
    columns = scales.repeat_interleave(recipe.block, 1)[:, : shape[1]]
    if _square(recipe, weight):
        return columns.repeat_interleave(recipe.block, 0)[: shape[0]]
    return columns


def rounded(
    values: Tensor,
    recipe: Recipe,
    *,
    weight: bool = False,
    gradient: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """What is left of the values after float8; ``scale`` is a given one (delayed scaling)."""
    wide = gradient and recipe.fp8_format is Format.HYBRID
    largest, dtype = (57344.0, torch.float8_e5m2) if wide else (448.0, torch.float8_e4m3fn)
    plain = values.float()
    if scale is None:
        scales = scales_of(plain, recipe, weight=weight, largest=largest)
        scale = spread(scales, values.shape, recipe, weight=weight)
    return (plain * scale).clamp(-largest, largest).to(dtype).float() / scale


def _square(recipe: Recipe, weight: bool) -> bool:
    return weight and not recipe.mxfp8()


def _blocks(values: Tensor, recipe: Recipe, weight: bool) -> Tensor:
    """The largest value of each block."""
    if recipe.block is None:
        return values.amax() if values.numel() else values.new_zeros(())
    rows, columns = values.shape
    size = recipe.block
    padded = F.pad(values, (0, -columns % size))
    found = padded.view(rows, padded.shape[1] // size, size).amax(2)
    if not _square(recipe, weight):
        return found
    padded = F.pad(found, (0, 0, 0, -rows % size))
    return padded.view(-1, size, found.shape[1]).amax(1)
