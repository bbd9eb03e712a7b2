#!/usr/bin/env python3
"""Time, size and balance of resharding plans for large models; no weights, one core.

python tools/benchmarks/resharding_plan.py
"""

import time
from collections.abc import Sequence

from transformers import DeepseekV3Config, Qwen3Config, Qwen3MoeConfig

from megatron_spear.config.presets.models import MODELS
from megatron_spear.conversion.families import deepseek_v3
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape, model_shape
from megatron_spear.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_spear.weight_sync.plan import plan_resharding

QWEN3_235B = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "vocab_size": 151_936,
    "tie_word_embeddings": False,
}

Case = tuple[str, ModelShape, TrainingLayout, EngineLayout, Sequence[WeightMap] | None]


def cases() -> list[Case]:
    """Models, layouts of training and engines."""
    published = {k: v for k, v in MODELS["qwen3-32b"].config.items() if k != "model_type"}
    deepseek = DeepseekV3Config()
    size = ModelShape(  # what of it the layouts ask for
        family="qwen3_moe",
        num_layers=deepseek.num_hidden_layers,
        hidden_size=deepseek.hidden_size,
        ffn_size=deepseek.moe_intermediate_size,
        num_heads=deepseek.num_attention_heads,
        num_groups=deepseek.num_attention_heads,
        head_dim=deepseek.v_head_dim,
        vocab_size=deepseek.vocab_size,
        norm_eps=deepseek.rms_norm_eps,
        rope_theta=1e4,
        num_experts=deepseek.n_routed_experts,
        experts_per_token=deepseek.num_experts_per_tok,
    )
    return [
        (
            "Qwen3-32B, TP8 PP4 DP4 to 16 of TP4",
            model_shape(Qwen3Config(**published)),
            TrainingLayout(tensor=8, pipeline=4, data=4),
            EngineLayout(tensor=4, replicas=16),
            None,
        ),
        (
            "Qwen3-235B-A22B, TP4 PP2 DP64 EP32 to 64 of TP8 EP8",
            model_shape(Qwen3MoeConfig(**QWEN3_235B)),
            TrainingLayout(tensor=4, pipeline=2, data=64, expert=32),
            EngineLayout(tensor=8, expert=8, replicas=64),
            None,
        ),
        (
            "DeepSeek-V3, TP8 PP8 DP8 EP64 to 16 of TP32 EP32",
            size,
            TrainingLayout(tensor=8, pipeline=8, data=8, expert=64),
            EngineLayout(tensor=32, expert=32, replicas=16),
            deepseek_v3.table(deepseek),
        ),
    ]


def main() -> None:
    """Print one table."""
    print("| plan (bf16) | CPU s | transfers | GB | over the bound | sent, max/mean | received |")
    print("|---|---|---|---|---|---|---|")
    for name, shape, training, engine, table in cases():
        started = time.process_time()
        plan = plan_resharding(shape, training, engine, table=table)
        seconds = time.process_time() - started
        sent, received = (x.max() / x.mean() for x in (plan.sent, plan.received))
        print(
            f"| {name} | {seconds:.2f} | {len(plan):,} | {plan.num_bytes.sum() / 1e9:,.0f} | "
            f"{plan.excess:.3f}x | {sent:.3f} | {received:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
