"""A tiny Qwen3 model with a word-level tokenizer, as a Hugging Face folder: the CPU quick start."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_spear.config.schema import TinyModelSection
from megatron_spear.conversion.word_tokenizer import END, PAD, make_tokenizer
from megatron_spear.errors import ConfigError

_EMBEDDING_STD = 0.05


def make_tiny_model(
    folder: Path | str,
    shape: TinyModelSection,
    words: Sequence[str],
    phrases: Sequence[str] = (),
    *,
    max_positions: int = 4096,
) -> Path:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Plain ``AutoModelForCausalLM`` and ``AutoTokenizer`` load the folder. fp32, tied embeddings; the
    same ``shape`` (its ``seed`` included), words and phrases give the same bytes. ``max_positions``
    is the longest context. Returns the folder; raises ConfigError for an impossible shape.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    _check(shape)
    tokenizer = make_tokenizer(words, phrases)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        bos_token_id=None,
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_config(config)
    _initialise(model, shape)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    path = Path(folder)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _check(shape: TinyModelSection) -> None:
    if shape.hidden_size % (2 * shape.num_heads):
        raise ConfigError(
            f"hidden_size={shape.hidden_size} and num_heads={shape.num_heads}: a head's size "
            "must be a whole, even number; choose hidden_size as a multiple of 2 * num_heads"
        )
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(
            f"num_kv_heads={shape.num_kv_heads} does not divide num_heads={shape.num_heads}"
        )


def _initialise(model: Any, shape: TinyModelSection) -> None:
    """Normal weights: embeddings 0.05, matrices d^-0.5, those into the residual stream / sqrt(2L).

    In the order of the names, from a generator of its own, so that nothing else moves the draw.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    matrix_std = shape.hidden_size**-0.5
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim != 2:
                parameter.fill_(1.0)
                continue
            std = _EMBEDDING_STD if "embed_tokens" in name else matrix_std
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * shape.num_layers) ** 0.5
            parameter.normal_(0.0, std, generator=generator)
