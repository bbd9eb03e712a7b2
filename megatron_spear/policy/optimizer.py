"""Megatron's Adam for the model, and the learning rate as a pure function of the step."""

import math
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.policy import cpu


def build_optimizer(
    model: list[DistributedDataParallel], section: OptimizerSection, policy: PolicySection
) -> Any:
    """Megatron's optimizer: AdamW without decay on norms and biases, gradients clipped by norm.

    Where torch's own AdamW serves (no apex, no TransformerEngine), its fused kernel is used.
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
        fp8_recipe=policy.fp8.recipe if policy.fp8.parameters else None,
    )
    with cpu.cuda_means_cpu():
        optimizer = get_megatron_optimizer(
            config,
            model,
            config_overrides=get_standard_config_overrides(config),
            use_gloo_process_groups=cpu.active(),
        )
    for group in optimizer.param_groups:
        # Megatron's own scheduler would do this; the schedule here is a pure function
        group["weight_decay"] = section.weight_decay * group.get("wd_mult", 1.0)
        if "fused" in group:
            group["fused"] = True
    return optimizer


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
