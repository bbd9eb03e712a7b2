"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from megatron_spear.conversion.families import llama
from megatron_spear.conversion.mapping import QkvMap, WeightMap
from megatron_spear.conversion.shape import ModelShape


def table(shape: ModelShape) -> tuple[WeightMap, ...]:
    """All maps of a Qwen2 model."""
    biases = (_bias(shape, number) for number in range(shape.num_layers))
    layers = ((*llama.layer(shape, n), bias) for n, bias in enumerate(biases))
    return (
        *llama.embedding(shape),
        *(item for maps in layers for item in maps),
        *llama.output(shape),
    )


def _bias(shape: ModelShape, number: int) -> WeightMap:
    heads = shape.num_heads * shape.head_dim
    groups = shape.num_groups * shape.head_dim
    return QkvMap(
        target="self_attention.linear_qkv.bias",
        sources=tuple(f"model.layers.{number}.self_attn.{part}_proj.bias" for part in "qkv"),
        shapes=((heads,), (groups,), (groups,)),
        layer=number,
        groups=shape.num_groups,
        head_dim=shape.head_dim,
    )
