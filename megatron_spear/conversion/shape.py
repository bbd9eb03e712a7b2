"""What of a Hugging Face config the policy, the engine and the weight tables need, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_spear.errors import CheckpointError, ConfigError

SUPPORTED = ("qwen3", "qwen3_moe", "qwen2", "llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder-only transformer with rotary positions, grouped queries and a gated MLP.

    With ``num_experts`` > 0 every layer's MLP is a mixture of that many experts, each of inner
    width ``ffn_size``: a token goes through the ``experts_per_token`` with the highest router
    probabilities (softmax over all), weighted with these, which ``normalize_routing`` makes sum
    to 1.
    """

    family: Literal["qwen3", "qwen3_moe", "qwen2", "llama", "mistral"]
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_length: int = 32768
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_routing: bool = False


def split_sizes(shape: ModelShape) -> dict[str, int]:
    """What tensor parallelism has to divide, by its name in config.json."""
    sizes = {"num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_groups}
    return sizes if shape.num_experts else sizes | {"intermediate_size": shape.ffn_size}


def load_config(path: Path) -> Any:
    """The folder's transformers config; CheckpointError if there is none that can be read."""
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json; expected a Hugging Face model folder "
            "(config.json, *.safetensors, tokenizer.json)"
        )
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read: {error}") from error


def model_shape(config: Any) -> ModelShape:
    """The shape of a transformers config; ConfigError names what is not supported."""
    family = getattr(config, "model_type", None)
    if family not in SUPPORTED:
        raise ConfigError(
            f"model_type {family!r} has no weight table; expected one of {', '.join(SUPPORTED)}"
        )
    _refuse_unsupported(config, family)
    experts = _experts(config) if family == "qwen3_moe" else {"ffn_size": config.intermediate_size}
    heads = config.num_attention_heads
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if not rope:  # transformers 4 keeps theta and scaling apart
        rope = dict(getattr(config, "rope_scaling", None) or {})
        rope["rope_theta"] = getattr(config, "rope_theta", 10000.0)
    rope_type = rope.setdefault("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"rope_type {rope_type!r} is not supported; expected one of {ROPE_TYPES}")
    return ModelShape(
        family=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_groups=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope=rope,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        max_length=config.max_position_embeddings,
        **experts,
    )


def _experts(config: Any) -> dict[str, Any]:
    """The fields that speak of experts; ConfigError unless all layers have the same ones."""
    experts, chosen = config.num_experts, config.num_experts_per_tok
    wrong = []
    if config.mlp_only_layers:
        wrong.append(f"mlp_only_layers {config.mlp_only_layers} (expected none)")
    if config.decoder_sparse_step != 1:
        wrong.append(f"decoder_sparse_step {config.decoder_sparse_step} (expected 1)")
    if not 1 <= chosen <= experts:
        wrong.append(f"num_experts_per_tok {chosen} (expected 1 to num_experts {experts})")
    if chosen == 1 and config.norm_topk_prob:
        wrong.append("norm_topk_prob with one expert a token (its weight would always be 1)")
    if wrong:
        raise ConfigError(
            "qwen3_moe config has what policy and engine do not support, which is a mixture of "
            f"experts in every layer: {'; '.join(wrong)}"
        )
    return {
        "ffn_size": config.moe_intermediate_size,
        "num_experts": experts,
        "experts_per_token": chosen,
        "normalize_routing": bool(config.norm_topk_prob),
    }


def _refuse_unsupported(config: Any, family: str) -> None:
    wrong = []
    if config.hidden_act not in ("silu", "swish"):
        wrong.append(f"hidden_act {config.hidden_act!r} (expected silu)")
    if family != "qwen2" and getattr(config, "attention_bias", False):
        wrong.append("attention_bias (expected false)")
    if getattr(config, "mlp_bias", False):
        wrong.append("mlp_bias (expected false)")
    if getattr(config, "use_sliding_window", False):
        wrong.append("use_sliding_window (expected false)")
    if family == "mistral" and config.sliding_window is not None:
        wrong.append(f"sliding_window {config.sliding_window} (expected null)")
    if getattr(config, "attention_dropout", 0.0):
        wrong.append(f"attention_dropout {config.attention_dropout} (expected 0)")
    if wrong:
        raise ConfigError(
            f"{family} config has what policy and engine do not support: {'; '.join(wrong)}"
        )
