"""A model's shape from its config.json alone, without transformers (which takes seconds to import).

What the file leaves out has the value that transformers gives it, except sizes, which it must say.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_spear.conversion.shape import ModelShape, model_shape
from megatron_spear.errors import CheckpointError

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "mlp_only_layers": (),
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
}
_OF_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"sliding_window": 4096, "max_position_embeddings": 131072},
}


def shape_of_values(values: Mapping[str, Any], source: str) -> ModelShape:
    """The shape that the values of a config.json give; ``source`` says where they are from.

    CheckpointError for sizes that are missing, ConfigError for what is not supported.
    """
    family = values.get("model_type")
    needed = [*_SIZES]
    if family == "qwen3_moe":
        needed += ["moe_intermediate_size", "num_experts", "num_experts_per_tok"]
    else:
        needed.append("intermediate_size")
    if family == "llama":
        needed.remove("num_key_value_heads")  # those of old checkpoints have as many as heads
    missing = [name for name in needed if not isinstance(values.get(name), int)]
    if family in (None, "") or missing:
        raise CheckpointError(
            f"{source} is no config.json of a decoder: {', '.join(missing) or 'model_type'} "
            "missing or no number"
        )
    own = _OF_FAMILY.get(str(family), {})
    return model_shape(SimpleNamespace(**{**_DEFAULTS, **own, **values}))


def shape_of_folder(folder: Path) -> ModelShape:
    """The shape of a Hugging Face folder's model; its config.json is enough."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); expected a Hugging Face model folder"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no table of settings")
    return shape_of_values(values, str(path))
