"""What a rank of a layout holds, and what that takes of a GPU in bf16, before anything is started.

A rank's **states** are 18 bytes a parameter, with the plain optimizer (not the distributed one):

    2 weight (bf16) + 4 gradient + 4 master weight + 8 Adam's two moments (float32)

Its **activations** are what autograd keeps of a micro-batch of T tokens, without recomputation and
with sequence parallel wherever tensor parallel t > 1. Context parallel c leaves a rank T / c of
them, which is T below. A layer keeps in bf16, each split over t:

    4 hidden                                      the inputs of both norms, and what they give
    (heads + 2 groups) d                          query, key and value as they come
    (heads + groups) d + heads d                  query and key after rotary positions, the result
    2 ffn + ffn                                   gate and up, and the input of the down projection

and with c > 1 the keys and values it has gathered, ``(2 c + 1) groups d``; without them this
is ``2 T (4 hidden + 3 (heads + groups) d + 3 ffn) / t`` bytes. With experts, of which k see a
token, the last line is ``k (3 ffn + 2 hidden)``: what goes into and comes out of each too, if the
router spreads tokens evenly. Pipeline stage s of p keeps up to p - s micro-batches at a time (one
forward, one backward); the last stage also has the logits and their gradient, ``4 T V / t`` bytes.
Norms on query and key, one micro-batch's gathered sequences, and buffers of CUDA and NCCL are left
out.
"""

from dataclasses import dataclass
from math import prod

import torch

from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import Shape, padded_vocab
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.policy.parallel import Place
from megatron_spear.policy.weights import is_here, place_of

STATE_BYTES = 2 + 4 + 4 + 8
"""Bytes a parameter: weight, gradient, master weight, Adam's moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBytes:
    """What one rank needs, in bytes."""

    states: int
    activations: int

    @property
    def total(self) -> int:
        """Both."""
        return self.states + self.activations


def local_shapes(shape: ModelShape, place: Place) -> dict[str, Shape]:
    """Shape of every Megatron parameter that the rank holds, by its name there.

    Example: ``output_layer.weight`` of 50,257 x 8 on the last stage, tensor parallel 2: (25129, 8).
    """
    first_layer = shape.num_layers // place.pipeline_size * place.pipeline_rank
    first_expert = shape.num_experts // place.expert_size * place.expert_rank
    found: dict[str, Shape] = {}
    for item in weight_table(shape):
        copied = item.tied and place.pipeline_size == 1  # one stage has the embedding itself
        stage, _ = place_of(item, shape, place.pipeline_size, 1)
        if copied or not is_here(item, stage, shape, place):
            continue
        sources = [torch.empty(size, device="meta") for size in item.shapes]
        split = place.tensor_size if item.expert is None else 1  # experts are whole
        part = item.part(sources, place.tensor_rank % split, split)
        found[item.local_name(first_layer, first_expert)] = tuple(part.shape)
    return found


def fullest_rank(shape: ModelShape, policy: PolicySection) -> RankBytes:
    """What the pipeline stage that needs most needs on each of its ranks, in bf16."""
    stages = (_stage_bytes(shape, policy, stage) for stage in range(policy.pipeline_parallel))
    return max(stages, key=lambda stage: stage.total)


def _stage_bytes(shape: ModelShape, policy: PolicySection, stage: int) -> RankBytes:
    tensor, pipeline = policy.tensor_parallel, policy.pipeline_parallel
    place = Place(
        tensor_rank=0,
        tensor_size=tensor,
        pipeline_rank=stage,
        pipeline_size=pipeline,
        expert_size=policy.expert_parallel,
    )
    parameters = sum(prod(part) for part in local_shapes(shape, place).values())
    tokens = policy.tokens_per_microbatch // policy.context_parallel
    width = 3 * (shape.num_heads + shape.num_groups)
    if policy.context_parallel > 1:
        width += (2 * policy.context_parallel + 1) * shape.num_groups
    mlp = 3 * shape.ffn_size
    if shape.num_experts:
        mlp = shape.experts_per_token * (mlp + 2 * shape.hidden_size)
    layer = 4 * shape.hidden_size + width * shape.head_dim + mlp
    kept = (pipeline - stage) * (shape.num_layers // pipeline) * 2 * layer * tokens // tensor
    logits = 4 * tokens * padded_vocab(shape.vocab_size, tensor) // tensor
    return RankBytes(
        states=STATE_BYTES * parameters,
        activations=kept + (logits if stage == pipeline - 1 else 0),
    )
