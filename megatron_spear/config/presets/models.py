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

_SIZES = SHAPE_KEYS[1:]
_QWEN2 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 131072,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
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
_EXPERTS = {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_LLAMA = {
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
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def _model(
    hub_name: str,
    num_parameters: int,
    family: Mapping[str, Any],
    sizes: tuple[int, int, int, int, int],
    **changes: Any,
) -> PublishedModel:
    """One of a ``family``; ``sizes`` are those of ``SHAPE_KEYS`` after the type."""
    config = {**family, **dict(zip(_SIZES, sizes, strict=True)), **changes}
    return PublishedModel(hub_name=hub_name, config=config, num_parameters=num_parameters)


MODELS: dict[str, PublishedModel] = {
    "qwen2.5-1.5b": _model(
        "Qwen/Qwen2.5-1.5B",
        1_543_714_304,
        _QWEN2,
        (1536, 28, 12, 2, 8960),
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": _model("Qwen/Qwen2.5-7B", 7_615_616_512, _QWEN2, (3584, 28, 28, 4, 18944)),
    "qwen2.5-32b": _model(
        "Qwen/Qwen2.5-32B", 32_763_876_352, _QWEN2, (5120, 64, 40, 8, 27648), rms_norm_eps=1e-5
    ),
    "qwen3-8b": _model("Qwen/Qwen3-8B", 8_190_735_360, _QWEN3, (4096, 36, 32, 8, 12288)),
    "qwen3-32b": _model("Qwen/Qwen3-32B", 32_762_123_264, _QWEN3, (5120, 64, 64, 8, 25600)),
    "qwen3-30b-a3b": _model(
        "Qwen/Qwen3-30B-A3B", 30_532_122_624, _QWEN3, (2048, 48, 32, 4, 6144), **_EXPERTS
    ),
    "llama-3.1-70b": _model(
        "meta-llama/Llama-3.1-70B", 70_553_706_496, _LLAMA, (8192, 80, 64, 8, 28672)
    ),
}
"""By the name presets call it."""
