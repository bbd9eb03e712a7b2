"""Megatron's Adam for the model, and the learning rate as a pure function of the step."""

import contextlib
import functools
import logging
import math
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.policy import cpu, offload

logger = logging.getLogger(__name__)

_FUSED = {"apex": "apex", "TransformerEngine": "transformer_engine"}
"""Packages whose FusedAdam Megatron takes before torch's Adam, by the name to tell."""


def build_optimizer(
    model: list[DistributedDataParallel], section: OptimizerSection, policy: PolicySection
) -> Any:
    """Megatron's optimizer: AdamW without decay on norms and biases, gradients clipped by norm.

    Megatron takes TransformerEngine's FusedAdam or apex's where it can import one; else torch's
    AdamW serves, with its fused kernel. The log says which it is.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=policy.precision == "bf16",
        use_distributed_optimizer=policy.distributed_optimizer,
        overlap_param_gather=policy.overlap_param_gather,
        **offload.settings(policy),
        fp8_recipe=policy.fp8.recipe if policy.fp8.parameters else None,
    )
    offload.prepare(config)
    # without gradients, pieces of float32 parameters are tensors of their own to Megatron's offload
    without_grad = torch.no_grad() if policy.optimizer_offload else contextlib.nullcontext()
    with cpu.cuda_means_cpu(), without_grad:
        optimizer = get_megatron_optimizer(
            config,
            model,
            config_overrides=get_standard_config_overrides(config),
            use_gloo_process_groups=cpu.active(),
        )
    for part in filter(offload.is_hybrid, optimizer.chained_optimizers):
        offload.clean_groups(part)
    for group in optimizer.param_groups:
        # Megatron's own scheduler would do this; the schedule here is a pure function
        group["weight_decay"] = section.weight_decay * group.get("wd_mult", 1.0)
        if "fused" in group:
            group["fused"] = True
    _say(describe(optimizer))
    return optimizer


@functools.cache
def _say(text: str) -> None:
    """Log a line once."""
    logger.info(text)


def describe(optimizer: Any) -> str:
    """Which classes make the update, as they were built, in words.

    Example: ``optimizer: AdamW of torch (fused kernel); apex and TransformerEngine are not
    installed``.
    """
    kinds: dict[str, None] = {}
    for part in optimizer.chained_optimizers:
        hybrid = offload.is_hybrid(part)
        for adam in part.optimizer.sub_optimizers if hybrid else [part.optimizer]:
            text = f"{type(adam).__name__} of {type(adam).__module__.partition('.')[0]}"
            if all(group.get("fused") for group in adam.param_groups):
                text += " (fused kernel)"
            if hybrid:
                text += " on the GPU" if adam is part.optimizer.gpu_optimizer else " on the CPU"
            kinds[text] = None
    told = f"optimizer: {', '.join(kinds)}"
    if not any("FusedAdam" in kind for kind in kinds):
        there = {name: find_spec(package) is not None for name, package in _FUSED.items()}
        missing = [name for name, installed in there.items() if not installed]
        unused = [name for name, installed in there.items() if installed]
        if missing:
            are = "are" if len(missing) > 1 else "is"
            told += f"; {' and '.join(missing)} {are} not installed"
        if unused:
            told += f"; {' and '.join(unused)}: installed, but Megatron could not import it"
    return told


def learning_rate(section: OptimizerSection, step: int, total_steps: int) -> float:
    """The rate of the 1-based optimizer step ``step`` out of ``total_steps``.

    Linear warm-up to ``lr`` over ``warmup_steps``, then constant, or a linear or cosine descent to
    ``min_lr`` that is reached at ``total_steps`` and kept.

    Example: lr 1, warmup 2, linear, 6 steps: 0.5, 1, 0.75, 0.5, 0.25, 0.
    """
    warmup = section.warmup_steps
    if step <= warmup:
        return section.lr * step / warmup
    if section.schedule == "constant":
        return section.lr
    done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    share = 1.0 - done if section.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return section.min_lr + (section.lr - section.min_lr) * share
