"""Qwen3 (dense): Llama with norms on the heads of query and key."""

from megatron_spear.conversion.families import llama
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape


def table(shape: ModelShape) -> tuple[WeightMap, ...]:
    """All maps of a Qwen3 model."""
    layers = (
        (*llama.layer(shape, number), *norms(shape, number)) for number in range(shape.num_layers)
    )
    return (
        *llama.embedding(shape),
        *(item for maps in layers for item in maps),
        *llama.output(shape),
    )


def norms(shape: ModelShape, number: int) -> tuple[WeightMap, ...]:
    """The norms on the heads of query and key of one layer."""
    return tuple(
        WeightMap(
            target=f"self_attention.{part}_layernorm.weight",
            sources=(f"model.layers.{number}.self_attn.{part}_norm.weight",),
            shapes=((shape.head_dim,),),
            layer=number,
        )
        for part in "qk"
    )
