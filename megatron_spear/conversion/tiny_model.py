"""A tiny Qwen3 model with a word-level tokenizer, as a Hugging Face folder: the CPU quick start."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_spear.config.schema import TinyModelSection
from megatron_spear.conversion.hf_io import full_disk_told
from megatron_spear.conversion.word_tokenizer import END, PAD, make_tokenizer
from megatron_spear.errors import ConfigError

_EMBEDDING_STD = 0.2


def make_tiny_model(
    folder: Path | str,
    shape: TinyModelSection,
    words: Sequence[str],
    phrases: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    roles: Sequence[str] = (),
    single_digits: bool = False,
    max_positions: int = 4096,
) -> Path:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    Plain ``AutoModelForCausalLM`` and ``AutoTokenizer`` load the folder. fp32, tied embeddings; the
    same ``shape`` (its ``seed`` included) and vocabulary give the same bytes (``roles`` and
    ``single_digits`` as in `word_tokenizer`). ``max_positions`` is the longest context.
    Returns the folder; raises ConfigError for an impossible shape, CheckpointError if the disk is
    full (a new folder is then removed).
    """
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

    _check(shape)
    tokenizer = make_tokenizer(words, phrases, names, roles=roles, single_digits=single_digits)
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
    _compose_names(model, tokenizer, names)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    path = Path(folder)
    is_new = not path.exists()
    try:
        with full_disk_told(path):
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
    except BaseException:
        if is_new:
            shutil.rmtree(path, ignore_errors=True)
        raise
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
    """Normal weights: embeddings 0.2, matrices d^-0.5, down projections / sqrt(2L); norms 1.

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
            if name.endswith("down_proj.weight"):
                std /= (2 * shape.num_layers) ** 0.5
            parameter.normal_(0.0, std, generator=generator)
        for layer in model.model.layers:
            _prepare_to_copy(layer.self_attn, shape)


def _prepare_to_copy(attention: Any, shape: TinyModelSection) -> None:
    """Heads that look for tokens like their own and pass them on: what copying a name needs.

    Keys are drawn halfway to their group's first query, and what leaves a head is half of what
    entered it: W_O = W_V^T / 2. After "Mimetic Initialization of Self-Attention Layers"
    (arXiv 2305.09828). The warm start's loss on demonstrations after 200 steps of 16 was 0.24 with
    it and 0.30 without.
    """
    heads_per_group, width = shape.num_heads // shape.num_kv_heads, shape.hidden_size
    queries = attention.q_proj.weight.view(shape.num_kv_heads, heads_per_group, -1, width)
    attention.k_proj.weight.lerp_(queries[:, 0].reshape(-1, width), 0.5)
    values = attention.v_proj.weight.view(shape.num_kv_heads, -1, width)
    values = values.repeat_interleave(heads_per_group, 0).view(-1, width)
    attention.o_proj.weight.copy_(0.5 * values.T)


def _compose_names(model: Any, tokenizer: Any, names: Sequence[str]) -> None:
    """A name starts as the sum of its words, so that `` mug 2`` is near `` mug`` and `` mug 1``."""
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name in names:
            parts = [tokenizer.convert_tokens_to_ids(f" {word}") for word in name.split()]
            index = tokenizer.convert_tokens_to_ids(f" {name}")
            embedding[index] = embedding[parts].sum(0) / len(parts) ** 0.5
