"""The presets: which ``policy.*`` settings a model wants on so many GPUs, and why.

All are for GPUs of 80 GB in nodes of 8 and bf16, and obey the same rules, which tests check: tensor
parallel divides heads, KV groups and the MLP; it and expert parallel stay within a node; pipeline
parallel divides the layers; the fullest rank stays below ``MAX_RANK_BYTES`` by the estimate of
``policy/memory.py``. Data parallel is what is left of the GPUs, so a preset also runs on other
multiples of tensor x pipeline parallel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megatron_spear.config.presets.models import MODELS, PublishedModel

GPUS_PER_NODE = 8
MAX_RANK_BYTES = 72 * 10**9
"""What of 80 GB a layout may plan with; the rest is for CUDA, NCCL, buffers of gathered sequences
and what the allocator cannot use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One layout of one model, with the reason for it."""

    model: str
    gpus: int
    policy: Mapping[str, Any]
    why: str

    @property
    def name(self) -> str:
        """What ``preset`` is set to, such as ``qwen2.5-7b-32gpus``."""
        return f"{self.model}-{self.gpus}gpus"

    @property
    def published(self) -> PublishedModel:
        """The model it is for."""
        return MODELS[self.model]


def unknown_preset(name: str) -> str:
    """What to tell about a name that is none, such as ``got 'qwen2.5-7b-32gpu', no such preset; did
    you mean qwen2.5-7b-32gpus?``."""
    near = get_close_matches(name.lower(), PRESETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PRESETS)}"
    return f"got {name!r}, no such preset; {hint}"


def _preset(
    model: str, gpus: int, tensor: int, pipeline: int, tokens: int, why: str, experts: int = 1
) -> Preset:
    """Sequence parallel wherever it is possible, since it costs nothing."""
    policy = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "expert_parallel": experts,
        "sequence_parallel": tensor > 1,
        "precision": "bf16",
        "tokens_per_microbatch": tokens,
    }
    return Preset(model=model, gpus=gpus, policy=policy, why=why)


_SMALLEST = "the smallest tensor parallel that fits: 2 leaves no room for activations"
_TWICE = "the room that more stages give goes to contexts of twice the length"

_TABLE = (
    _preset("qwen2.5-1.5b", 8, 1, 1, 8192, "a GPU holds it whole; only gradients are exchanged"),
    _preset("qwen2.5-1.5b", 32, 1, 1, 8192, "as on 8, four times the replicas"),
    _preset("qwen2.5-1.5b", 128, 2, 1, 16384, "half the replicas, each with twice the tokens"),
    _preset("qwen2.5-7b", 8, 4, 1, 16384, _SMALLEST),
    _preset("qwen2.5-7b", 32, 4, 1, 16384, "as on 8; 4 KV groups allow no more tensor parallel"),
    _preset("qwen2.5-7b", 128, 4, 1, 16384, "as on 8; one stage, so no pipeline bubble"),
    _preset("qwen2.5-7b", 512, 4, 2, 32768, f"a node a replica; {_TWICE}"),
    _preset("qwen3-8b", 8, 4, 1, 16384, _SMALLEST),
    _preset("qwen3-8b", 32, 4, 1, 16384, "as on 8, four times the replicas"),
    _preset("qwen3-8b", 128, 8, 1, 32768, "a node a replica; contexts of twice the length"),
    _preset("qwen3-8b", 512, 8, 1, 32768, "as on 128, four times the replicas"),
    *(
        _preset(model, gpus, 8, stages, tokens, why)
        for model in ("qwen2.5-32b", "qwen3-32b")
        for gpus, stages, tokens, why in (
            (32, 2, 8192, "a node a stage: one stage leaves no room for activations"),
            (128, 2, 8192, "as on 32, four times the replicas"),
            (512, 4, 16384, f"16 replicas; {_TWICE}"),
        )
    ),
    _preset("qwen3-30b-a3b", 32, 4, 2, 8192, "the experts over a node; one stage does not fit", 8),
    _preset("qwen3-30b-a3b", 128, 4, 2, 8192, "as on 32, four times the replicas", 8),
    _preset("qwen3-30b-a3b", 512, 4, 4, 16384, f"32 replicas; {_TWICE}", 8),
    _preset("llama-3.1-70b", 32, 8, 4, 8192, "a node a stage; 2 stages would not hold it"),
    _preset("llama-3.1-70b", 128, 8, 4, 8192, "as on 32, four replicas"),
    _preset("llama-3.1-70b", 512, 8, 8, 8192, "8 replicas; stages of 10 layers, half the states"),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _TABLE}
"""By name."""
