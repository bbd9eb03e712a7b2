"""The published models that presets are for: what their config.json says, and their size.

Values are those of the base checkpoints on the Hugging Face hub; the instruction-tuned ones have
the same shapes. Tests build each on torch's meta device with transformers and count its parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """A model of the hub: ``config`` is what of its config.json shapes the model."""

    hub_name: str
    config: Mapping[str, Any]
    num_parameters: int
    """Tied embeddings counted once."""


SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
"""What a layout depends on, and what tells one model from another."""

_QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 131072,
}
_QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "head_dim": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
}

MODELS: dict[str, PublishedModel] = {
    "qwen2.5-1.5b": PublishedModel(
        hub_name="Qwen/Qwen2.5-1.5B",
        num_parameters=1_543_714_304,
        config=_QWEN2
        | {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": PublishedModel(
        hub_name="Qwen/Qwen2.5-7B",
        num_parameters=7_615_616_512,
        config=_QWEN2
        | {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2.5-32b": PublishedModel(
        hub_name="Qwen/Qwen2.5-32B",
        num_parameters=32_763_876_352,
        config=_QWEN2
        | {
            "vocab_size": 152064,
            "hidden_size": 5120,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "intermediate_size": 27648,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-8b": PublishedModel(
        hub_name="Qwen/Qwen3-8B",
        num_parameters=8_190_735_360,
        config=_QWEN3
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 12288,
        },
    ),
    "qwen3-32b": PublishedModel(
        hub_name="Qwen/Qwen3-32B",
        num_parameters=32_762_123_264,
        config=_QWEN3
        | {
            "hidden_size": 5120,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 25600,
        },
    ),
    "qwen3-30b-a3b": PublishedModel(
        hub_name="Qwen/Qwen3-30B-A3B",
        num_parameters=30_532_122_624,
        config=_QWEN3
        | {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "llama-3.1-70b": PublishedModel(
        hub_name="meta-llama/Llama-3.1-70B",
        num_parameters=70_553_706_496,
        config={
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
            "vocab_size": 128256,
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
    ),
}
"""By the name presets call it."""
