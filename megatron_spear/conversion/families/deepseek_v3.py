"""DeepSeek-V3: names, shapes and splits of its weights, for planning; the policy does not run it.

Attention is latent: queries and key-values go through narrow projections (``down``, the same on
every rank) and wide ones (``up``, split by heads). The first layers are dense, the others have
routed experts, a shared one and a bias for each expert's choice.
"""

from typing import Any

from megatron_spear.conversion.families.qwen3_moe import expert_maps
from megatron_spear.conversion.mapping import GatedMap, SplitMap, VocabMap, WeightMap


def table(config: Any) -> tuple[WeightMap, ...]:
    """All maps of the model a transformers config describes (without its multi-token prediction).

    With the published config they hold 671,026,419,200 parameters.
    """
    vocab = (config.vocab_size, config.hidden_size)
    layers = (_layer(config, number) for number in range(config.num_hidden_layers))
    return (
        VocabMap(
            target="embedding.word_embeddings.weight",
            sources=("model.embed_tokens.weight",),
            shapes=(vocab,),
            stage="first",
        ),
        *(item for maps in layers for item in maps),
        WeightMap(
            target="decoder.final_layernorm.weight",
            sources=("model.norm.weight",),
            shapes=((config.hidden_size,),),
            stage="last",
        ),
        VocabMap(
            target="output_layer.weight",
            sources=("lm_head.weight",),
            shapes=(vocab,),
            stage="last",
        ),
    )


def _layer(config: Any, number: int) -> tuple[WeightMap, ...]:
    hidden = config.hidden_size
    norms = tuple(
        WeightMap(
            target=f"{ours}.weight",
            sources=(f"model.layers.{number}.{theirs}.weight",),
            shapes=((hidden,),),
            layer=number,
        )
        for ours, theirs in (
            ("input_layernorm", "input_layernorm"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
        )
    )
    if number < config.first_k_dense_replace:
        mlp = _gated(config.intermediate_size, hidden, number, "mlp", "mlp")
    else:
        mlp = _mixture(config, number)
    return (*norms, *_attention(config, number), *mlp)


def _attention(config: Any, number: int) -> tuple[WeightMap, ...]:
    """Latent attention: the two narrow projections and norms are whole on every rank."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    rank_q, rank_kv = config.q_lora_rank, config.kv_lora_rank
    turned, straight = config.qk_rope_head_dim, config.qk_nope_head_dim
    whole = (
        ("linear_q_down_proj", "q_a_proj", (rank_q, hidden)),
        ("q_layernorm", "q_a_layernorm", (rank_q,)),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa", (rank_kv + turned, hidden)),
        ("kv_layernorm", "kv_a_layernorm", (rank_kv,)),
    )
    split = (
        ("linear_q_up_proj", "q_b_proj", (heads * (straight + turned), rank_q), 0),
        ("linear_kv_up_proj", "kv_b_proj", (heads * (straight + config.v_head_dim), rank_kv), 0),
        ("linear_proj", "o_proj", (hidden, heads * config.v_head_dim), 1),
    )
    name = f"model.layers.{number}.self_attn."
    return (
        *(
            WeightMap(
                target=f"self_attention.{ours}.weight",
                sources=(f"{name}{theirs}.weight",),
                shapes=(shape,),
                layer=number,
            )
            for ours, theirs, shape in whole
        ),
        *(
            SplitMap(
                target=f"self_attention.{ours}.weight",
                sources=(f"{name}{theirs}.weight",),
                shapes=(shape,),
                layer=number,
                axis=axis,
            )
            for ours, theirs, shape, axis in split
        ),
    )


def _mixture(config: Any, number: int) -> tuple[WeightMap, ...]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    experts = config.n_routed_experts
    gate = f"model.layers.{number}.mlp.gate."
    router = (
        WeightMap(
            target="mlp.router.weight",
            sources=(gate + "weight",),
            shapes=((experts, hidden),),
            layer=number,
        ),
        WeightMap(
            target="mlp.router.expert_bias",
            sources=(gate + "e_score_correction_bias",),
            shapes=((experts,),),
            layer=number,
        ),
    )
    shared = _gated(
        width * config.n_shared_experts, hidden, number, "mlp.shared_experts", "mlp.shared_experts"
    )
    routed = (
        item for expert in range(experts) for item in expert_maps(hidden, width, number, expert)
    )
    return (*router, *shared, *routed)


def _gated(width: int, hidden: int, number: int, ours: str, theirs: str) -> tuple[WeightMap, ...]:
    """A gated MLP of inner ``width`` that tensor parallelism splits."""
    name = f"model.layers.{number}.{theirs}."
    return (
        GatedMap(
            target=f"{ours}.linear_fc1.weight",
            sources=(name + "gate_proj.weight", name + "up_proj.weight"),
            shapes=((width, hidden), (width, hidden)),
            layer=number,
        ),
        SplitMap(
            target=f"{ours}.linear_fc2.weight",
            sources=(name + "down_proj.weight",),
            shapes=((hidden, width),),
            layer=number,
            axis=1,
        ),
    )
