"""Mistral: the tensors of Llama under the same names."""

from megatron_spear.conversion.families import llama
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape


def table(shape: ModelShape) -> tuple[WeightMap, ...]:
    """All maps of a Mistral model."""
    return llama.table(shape)
