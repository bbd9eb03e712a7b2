"""The presets: which ``policy.*`` settings a model wants on so many GPUs, and why.

All are for GPUs of 80 GB in nodes of 8 and bf16, and obey the same rules, which tests check: tensor
parallel divides heads, KV groups and the MLP; it and expert parallel stay within a node; pipeline
parallel divides the layers; the fullest rank stays below ``MAX_RANK_BYTES`` by the estimate of
``cluster/planner``. Data parallel is what is left of the GPUs, so a preset also runs on other
multiples of tensor x pipeline parallel; on fewer, each rank has more of the optimizer's states.
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
    model: str,
    gpus: int,
    tensor: int,
    pipeline: int,
    tokens: int,
    recompute: str,
    why: str,
    experts: int = 1,
) -> Preset:
    """Sequence parallel wherever it is possible, since it costs nothing, and all that splits the
    optimizer and hides what its ranks say to each other: every layout here has several replicas."""
    policy = {
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
        "expert_parallel": experts,
        "sequence_parallel": tensor > 1,
        "precision": "bf16",
        "tokens_per_microbatch": tokens,
        "recompute": recompute,
        "distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    return Preset(model=model, gpus=gpus, policy=policy, why=why)


_NONE, _FULL = "none", "full"
_PAIR = "2 GPUs a replica; one would not hold it"
_KEPT = "tensor parallel 4 has room to keep activations: no second forward pass"
_NODE = "a node a replica: one stage, no pipeline bubble"
_LONG = "the states of a replica, split over more, leave room for twice the length"

_TABLE = (
    _preset("qwen2.5-1.5b", 8, 1, 1, 16384, _NONE, "a GPU holds it whole"),
    _preset("qwen2.5-1.5b", 32, 1, 1, 32768, _FULL, "twice the length, by recomputation"),
    _preset("qwen2.5-1.5b", 128, 2, 1, 32768, _NONE, "twice the length, by tensor parallel"),
    *(
        _preset(model, gpus, tensor, 1, 32768, recompute, why)
        for model in ("qwen2.5-7b", "qwen3-8b")
        for gpus, tensor, recompute, why in (
            (8, 2, _FULL, _PAIR),
            (32, 4, _NONE, _KEPT),
            (128, 4, _NONE, "as on 32, four times the replicas"),
            (512, 4, _NONE, "as on 32, sixteen times the replicas"),
        )
    ),
    *(
        _preset(model, gpus, 8, 1, tokens, _FULL, why)
        for model in ("qwen2.5-32b", "qwen3-32b")
        for gpus, tokens, why in (
            (16, 32768, _NODE),
            (32, 32768, "as on 16, twice the replicas"),
            (128, 65536, _LONG),
            (512, 65536, "as on 128, four times the replicas"),
        )
    ),
    _preset("qwen3-30b-a3b", 16, 4, 1, 32768, _FULL, "the experts over a node", 8),
    _preset("qwen3-30b-a3b", 32, 4, 1, 32768, _FULL, "as on 16, twice the replicas", 8),
    _preset("qwen3-30b-a3b", 128, 4, 1, 16384, _NONE, "no second forward pass", 8),
    _preset("qwen3-30b-a3b", 512, 4, 2, 32768, _NONE, "two stages: twice the length so too", 8),
    _preset("llama-3.1-70b", 32, 8, 2, 32768, _FULL, "a node a stage; one would not hold it"),
    _preset("llama-3.1-70b", 128, 8, 2, 65536, _FULL, _LONG),
    _preset("llama-3.1-70b", 512, 8, 2, 65536, _FULL, "as on 128, four times the replicas"),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _TABLE}
"""By name."""
