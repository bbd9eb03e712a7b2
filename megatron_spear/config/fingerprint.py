"""Which settings make two runs the same run: a hash, and the differences in words."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_spear.config.schema import RunConfig
from megatron_spear.config.sources import leaves

RESUME_MAY_DIFFER = (
    "run.dir",
    "run.name",
    "run.stop_after",
    "run.threads",
    "run.hang_limit_s",
    "resume",
    "model.cache_dir",
    "preset",
    "policy.tensor_parallel",
    "policy.context_parallel",
    "policy.pipeline_parallel",
    "policy.expert_parallel",
    "policy.virtual_pipeline",
    "policy.sequence_parallel",
    "policy.tokens_per_microbatch",
    "policy.recompute",
    "policy.optimizer_offload",
    "policy.overlap_grad_reduce",
    "policy.overlap_param_gather",
    "rollout.max_slots",
    "rollout.servers",
    "rollout.max_requests_per_server",
    "rollout.colocated",
    "rollout.env_workers",
    "rollout.env_deadline_s",
    "rollout.engine_deadline_s",
    "weight_sync.transport",
    "weight_sync.bucket_bytes",
    "weight_sync.engine_expert_parallel",
    "weight_sync.deadline_s",
    "weight_sync.host",
    "weight_sync.folder",
    "weight_sync.max_logprob_gap",
    "evaluation.every",
    "checkpoint",
    "tracking",
    "cluster",
)
"""Keys (with all below them) that a resumed run may change: they say where and how fast the run
goes, not what it computes. Layout keys are here because loss and gradient do not depend on the
layout; a checkpoint that cannot be read in another layout refuses by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One setting in which two configurations differ."""

    path: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.path}: was {self.old!r}, now {self.new!r}"


def config_hash(config: RunConfig) -> str:
    """sha256 (hex) of what defines the steps of a run: all settings but ``RESUME_MAY_DIFFER`` and,
    where the steps do not depend on it, their number."""
    kept = defining_settings(config.model_dump(mode="json"))
    if _may_be_longer(config):
        kept.pop("run.steps")
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def defining_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted path, without those of ``RESUME_MAY_DIFFER``.

    ``settings`` is the tree of a ``config.yaml``, one of another version too.
    """
    return {path: value for path, value in leaves(settings) if not _may_differ(path)}


def config_differences(
    old: RunConfig, new: RunConfig, *, everything: bool = False
) -> tuple[Difference, ...]:
    """Settings that differ; only with ``everything`` those that a resumed run may change, which are
    ``RESUME_MAY_DIFFER`` and more ``run.steps`` where the steps so far do not depend on it."""
    before, after = dict(_flat(old)), dict(_flat(new))
    is_longer = _may_be_longer(old) and _may_be_longer(new) and new.run.steps > old.run.steps

    def is_free(path: str) -> bool:
        return _may_differ(path) or (is_longer and path == "run.steps")

    return tuple(
        Difference(path=path, old=before.get(path), new=after.get(path))
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path) and (everything or not is_free(path))
    )


def _may_be_longer(config: RunConfig) -> bool:
    """Whether a run of more steps begins as this one; a decaying learning rate spans all steps."""
    return config.policy.optimizer.schedule == "constant"


def _may_differ(path: str) -> bool:
    return any(path == free or path.startswith(free + ".") for free in RESUME_MAY_DIFFER)


def _flat(config: RunConfig) -> Iterator[tuple[str, Any]]:
    yield from leaves(config.model_dump(mode="json"))
