"""Qwen3-MoE: Qwen3 with a router and experts in place of the MLP."""

from megatron_spear.conversion.families import llama, qwen3
from megatron_spear.conversion.mapping import GatedMap, WeightMap
from megatron_spear.conversion.shape import ModelShape


def table(shape: ModelShape) -> tuple[WeightMap, ...]:
    """All maps of a Qwen3-MoE model."""
    layers = (
        (
            *llama.attention(shape, number),
            *qwen3.norms(shape, number),
            _router(shape, number),
            *(
                item
                for expert in range(shape.num_experts)
                for item in expert_maps(shape.hidden_size, shape.ffn_size, number, expert)
            ),
        )
        for number in range(shape.num_layers)
    )
    return (
        *llama.embedding(shape),
        *(item for maps in layers for item in maps),
        *llama.output(shape),
    )


def _router(shape: ModelShape, number: int) -> WeightMap:
    return WeightMap(
        target="mlp.router.weight",
        sources=(f"model.layers.{number}.mlp.gate.weight",),
        shapes=((shape.num_experts, shape.hidden_size),),
        layer=number,
    )


def expert_maps(hidden: int, ffn: int, number: int, expert: int) -> tuple[WeightMap, ...]:
    """One expert of layer ``number``, of inner width ``ffn``."""
    name = f"model.layers.{number}.mlp.experts.{expert}."
    return (
        GatedMap(
            target="linear_fc1.weight",
            sources=(name + "gate_proj.weight", name + "up_proj.weight"),
            shapes=((ffn, hidden), (ffn, hidden)),
            layer=number,
            expert=expert,
        ),
        WeightMap(
            target="linear_fc2.weight",
            sources=(name + "down_proj.weight",),
            shapes=((hidden, ffn),),
            layer=number,
            expert=expert,
        ),
    )
