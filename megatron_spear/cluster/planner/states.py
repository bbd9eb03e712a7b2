"""What a training rank holds all the time: weights, gradients and Adam's state.

Bytes a parameter:

    weight      4 in fp32; 2 in bf16. A layer's matrix in FP8 has 2 more, its values by rows and by
                columns, which TransformerEngine keeps over a step's micro-batches; with
                ``policy.fp8.parameters`` these 2 alone
    gradient    4, in Megatron's buffer (``grad_reduce_in_fp32``)
    optimizer   8 for Adam's two moments, and 4 for a float32 master weight unless the weight is one

A distributed optimizer splits the optimizer's over the data-parallel ranks; those of an expert over
the ranks that hold the same expert, tensor x data / expert parallel. Weights and gradients stay
whole. Context parallel ranks count as data parallel ones here. ``policy.optimizer_offload`` moves a
share to the host, where 16 bytes a parameter are needed: master weight, moments and a gradient.

Sources: ZeRO (arXiv 1910.02054, section 3.1) for 2 + 4 + 4 + 8, Megatron-Core's
``distributed/param_and_grad_buffer.py`` and ``optimizer/distrib_optimizer.py``; measured on CPU
ranks (docs/planner.md).
"""

from dataclasses import dataclass

from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import Parameters, layer_parameters, stage_parameters

WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
FP8_BYTES = 2
GRADIENT_BYTES = 4
MOMENTS_BYTES = 8
MASTER_BYTES = {"fp32": 0, "bf16": 4}
HOST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Bytes on one rank; ``host`` is in the host's memory."""

    weights: int
    gradients: int
    optimizer: int
    host: int

    @property
    def total(self) -> int:
        """Those on the device."""
        return self.weights + self.gradients + self.optimizer


def states(shape: ModelShape, policy: PolicySection, world_size: int, stage: int) -> States:
    """Of each rank of pipeline stage ``stage``."""
    tensor, pipeline, expert = (
        policy.tensor_parallel,
        policy.pipeline_parallel,
        policy.expert_parallel,
    )
    own = stage_parameters(shape, stage, tensor=tensor, pipeline=pipeline, expert=expert)
    shares = expert_shares = 1
    if policy.distributed_optimizer:
        stage_size = world_size // pipeline
        shares, expert_shares = stage_size // tensor, stage_size // expert
    updated = (own.linears + own.rest) / shares + own.experts / expert_shares
    here = (MOMENTS_BYTES + MASTER_BYTES[policy.precision]) * (1 - policy.optimizer_offload)
    return States(
        weights=_weights(shape, policy, own, stage),
        gradients=GRADIENT_BYTES * own.total,
        optimizer=round(updated * here),
        host=round(updated * HOST_BYTES * policy.optimizer_offload),
    )


def _weights(shape: ModelShape, policy: PolicySection, own: Parameters, stage: int) -> int:
    plain = WEIGHT_BYTES[policy.precision] * own.total
    fp8 = policy.fp8
    if fp8.recipe == "none":
        return plain
    layer = layer_parameters(shape, policy.tensor_parallel, policy.expert_parallel)
    layers = shape.num_layers // policy.pipeline_parallel
    layers -= fp8.bf16_layers_at_start if stage == 0 else 0
    layers -= fp8.bf16_layers_at_end if stage == policy.pipeline_parallel - 1 else 0
    quantized = layers * (layer.linears + layer.experts)
    instead = WEIGHT_BYTES[policy.precision] if fp8.parameters else 0
    return plain + (FP8_BYTES - instead) * quantized
