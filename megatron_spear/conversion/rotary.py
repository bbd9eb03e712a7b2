"""The frequencies of rotary positions, the same for the policy and the embedded engine."""

import math

import torch
from torch import Tensor

from megatron_spear.conversion.shape import ModelShape


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Inverse frequencies ``[D / 2]``: default, linear or Llama 3 scaling."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    kind = shape.rope.get("rope_type", "default")
    if kind == "linear":
        return frequencies / shape.rope["factor"]
    if kind == "llama3":
        return _llama3(frequencies, shape)
    return frequencies


def _llama3(frequencies: Tensor, shape: ModelShape) -> Tensor:
    """Long wavelengths are divided by ``factor``, middle ones blended (Llama 3.1)."""
    rope = shape.rope
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope["factor"] + blend * frequencies
