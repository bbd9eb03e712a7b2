"""One weight table a model family; ``weight_table(shape)`` picks it."""

from megatron_spear.conversion.families import llama, mistral, qwen2, qwen3, qwen3_moe
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape

_TABLES = {
    "llama": llama.table,
    "mistral": mistral.table,
    "qwen2": qwen2.table,
    "qwen3": qwen3.table,
    "qwen3_moe": qwen3_moe.table,
}


def weight_table(shape: ModelShape) -> tuple[WeightMap, ...]:
    """Every Megatron parameter of the model once, in the order they are streamed."""
    return _TABLES[shape.family](shape)
