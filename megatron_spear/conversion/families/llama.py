"""Llama: the plain dense decoder. The other families add to this table."""

from megatron_spear.conversion.mapping import (
    GatedMap,
    QkvMap,
    SplitMap,
    VocabMap,
    WeightMap,
)
from megatron_spear.conversion.shape import ModelShape


def table(shape: ModelShape) -> tuple[WeightMap, ...]:
    """All maps of a Llama model."""
    layers = (layer(shape, number) for number in range(shape.num_layers))
    return (*embedding(shape), *(item for maps in layers for item in maps), *output(shape))


def embedding(shape: ModelShape) -> tuple[WeightMap, ...]:
    """What the first pipeline stage holds besides its layers."""
    return (
        VocabMap(
            target="embedding.word_embeddings.weight",
            sources=("model.embed_tokens.weight",),
            shapes=((shape.vocab_size, shape.hidden_size),),
            stage="first",
        ),
    )


def output(shape: ModelShape) -> tuple[WeightMap, ...]:
    """What the last pipeline stage holds besides its layers."""
    hidden = shape.hidden_size
    return (
        WeightMap(
            target="decoder.final_layernorm.weight",
            sources=("model.norm.weight",),
            shapes=((hidden,),),
            stage="last",
        ),
        VocabMap(
            target="output_layer.weight",
            sources=("model.embed_tokens.weight" if shape.tied else "lm_head.weight",),
            shapes=((shape.vocab_size, hidden),),
            stage="last",
            tied=shape.tied,
        ),
    )


def layer(shape: ModelShape, number: int) -> tuple[WeightMap, ...]:
    """One decoder layer."""
    return (*attention(shape, number), *_mlp(shape, number))


def attention(shape: ModelShape, number: int) -> tuple[WeightMap, ...]:
    """One decoder layer up to the norm before its MLP."""
    name, hidden = f"model.layers.{number}.", shape.hidden_size
    heads = shape.num_heads * shape.head_dim
    groups = shape.num_groups * shape.head_dim
    return (
        WeightMap(
            target="input_layernorm.weight",
            sources=(name + "input_layernorm.weight",),
            shapes=((hidden,),),
            layer=number,
        ),
        QkvMap(
            target="self_attention.linear_qkv.weight",
            sources=tuple(f"{name}self_attn.{part}_proj.weight" for part in "qkv"),
            shapes=((heads, hidden), (groups, hidden), (groups, hidden)),
            layer=number,
            groups=shape.num_groups,
            head_dim=shape.head_dim,
        ),
        SplitMap(
            target="self_attention.linear_proj.weight",
            sources=(name + "self_attn.o_proj.weight",),
            shapes=((hidden, heads),),
            layer=number,
            axis=1,
        ),
        WeightMap(
            target="pre_mlp_layernorm.weight",
            sources=(name + "post_attention_layernorm.weight",),
            shapes=((hidden,),),
            layer=number,
        ),
    )


def _mlp(shape: ModelShape, number: int) -> tuple[WeightMap, ...]:
    name, hidden, ffn = f"model.layers.{number}.mlp.", shape.hidden_size, shape.ffn_size
    return (
        GatedMap(
            target="mlp.linear_fc1.weight",
            sources=(name + "gate_proj.weight", name + "up_proj.weight"),
            shapes=((ffn, hidden), (ffn, hidden)),
            layer=number,
        ),
        SplitMap(
            target="mlp.linear_fc2.weight",
            sources=(name + "down_proj.weight",),
            shapes=((hidden, ffn),),
            layer=number,
            axis=1,
        ),
    )
