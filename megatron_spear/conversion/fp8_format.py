"""How a Hugging Face folder says that its linear layers are in FP8 blocks; for those without
torch."""

from typing import Any

BLOCK = 128
"""Values that share a scale, in each direction."""
CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""The ``quantization_config`` of config.json."""
