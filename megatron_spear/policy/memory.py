"""What a rank of a layout holds, and what that takes of a GPU in bf16, before anything is started.

A rank's **states** are 18 bytes a parameter:

    2 weight (bf16) + 4 gradient + 4 master weight + 8 Adam's two moments (float32)

A distributed optimizer splits the last 12 over the data-parallel ranks; those of an expert over
the ranks that hold the same expert, tensor x data / expert parallel. Weights and gradients stay
whole. Context parallel ranks count as data parallel ones here.

Its **activations** are what autograd keeps of a micro-batch of T tokens, 2 bytes a number, with
sequence parallel wherever tensor parallel t > 1. Context parallel c leaves a rank T / c of them,
which is T below. With H = heads d and G = groups d a layer keeps of each token, split over t:

    4 hidden        the inputs of both norms, and what they give
    H + 2 G         query, key and value in one, as they come (the value is a view of it)
    H               the query alone, where it is read again (a copy, if a rank has several groups)
    H + G           query and key after rotary positions, which the kernel keeps
    (2 c + 1) G     with c > 1, the keys and values it has gathered (not counted by a test)
    H               the attention's result, the input of the next linear layer
    3 ffn           gate and up, and the input of the down projection

The query is read again by norms on query and key, and by recomputation. With experts, of which k
see a token, the last line is ``k (4 ffn + hidden)``: what goes in, gate and up, and their product
before and after the router's weight, if the router spreads tokens evenly.

- ``recompute=selective`` keeps query and key before rotary positions in place of those after. That
  saves G with several groups a rank, H + G with one, and nothing with norms on query and key, whose
  results are kept then: the kernel keeps no square of scores, for which Megatron made this.
- ``recompute=full`` keeps a layer's input alone, ``hidden / t``, and once the rest of the layer
  that is just computed again.

Pipeline stage s of p keeps up to p - s micro-batches at a time (one forward, one backward); the
last stage also has the final norm's input and result and the logits with their gradient,
``2 T (2 hidden + 2 V) / t`` bytes. Norms' scales, the softmax's denominators, the router's
probabilities, one micro-batch's gathered sequences, and buffers of CUDA and NCCL are left out.
"""

from dataclasses import dataclass
from math import prod

import torch

from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import Shape, padded_vocab, place_of
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.policy.parallel import Place
from megatron_spear.policy.weights import is_here

WHOLE_BYTES = 2 + 4
"""Bytes a parameter: weight and gradient."""
OPTIMIZER_BYTES = 4 + 8
"""Bytes a parameter: master weight and Adam's moments."""


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
        stage, _ = place_of(item, shape.num_layers, place.pipeline_size)
        if copied or not is_here(item, stage, shape, place):
            continue
        sources = [torch.empty(size, device="meta") for size in item.shapes]
        split = place.tensor_size if item.expert is None else 1  # experts are whole
        part = item.part(sources, place.tensor_rank % split, split)
        found[item.local_name(first_layer, first_expert)] = tuple(part.shape)
    return found


def fullest_rank(shape: ModelShape, policy: PolicySection, world_size: int) -> RankBytes:
    """What the pipeline stage that needs most needs on each of its ranks, in bf16.

    Of interleaved pipelines (``policy.virtual_pipeline`` > 1) it knows nothing.
    """
    assert policy.virtual_pipeline == 1, "interleaved stages keep more micro-batches"
    stages = (
        RankBytes(
            states=_states(shape, policy, world_size, stage),
            activations=_activations(shape, policy, stage),
        )
        for stage in range(policy.pipeline_parallel)
    )
    return max(stages, key=lambda stage: stage.total)


def _states(shape: ModelShape, policy: PolicySection, world_size: int, stage: int) -> int:
    place = Place(
        tensor_rank=0,
        tensor_size=policy.tensor_parallel,
        pipeline_rank=stage,
        pipeline_size=policy.pipeline_parallel,
        expert_size=policy.expert_parallel,
    )
    total, stage_size = 0.0, world_size // policy.pipeline_parallel
    for name, part in local_shapes(shape, place).items():
        here = policy.expert_parallel if ".experts." in name else policy.tensor_parallel
        shares = stage_size // here if policy.distributed_optimizer else 1
        total += prod(part) * (WHOLE_BYTES + OPTIMIZER_BYTES / shares)
    return round(total)


def _activations(shape: ModelShape, policy: PolicySection, stage: int) -> int:
    tensor, pipeline = policy.tensor_parallel, policy.pipeline_parallel
    width = kept_a_token(shape, policy) * (shape.num_layers // pipeline) * (pipeline - stage)
    if policy.recompute == "full":  # and the layer that is computed again
        width += kept_a_token(shape, policy.model_copy(update={"recompute": "none"}))
        width -= kept_a_token(shape, policy)  # its input is there
    if stage == pipeline - 1:
        width += 2 * (shape.hidden_size + padded_vocab(shape.vocab_size, tensor)) // tensor
    return 2 * width * (policy.tokens_per_microbatch // policy.context_parallel)


def kept_a_token(shape: ModelShape, policy: PolicySection) -> int:
    """Numbers that a layer keeps of one token on a rank, between its two passes."""
    hidden, tensor = shape.hidden_size, policy.tensor_parallel
    if policy.recompute == "full":
        return hidden // tensor
    heads, groups = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    again = policy.recompute == "selective"
    width = 4 * hidden + (heads + 2 * groups) + heads
    if (again or shape.qk_norm) and shape.num_groups > tensor:
        width += heads  # the copied query
    if shape.qk_norm or not again:
        width += heads + groups
    if policy.context_parallel > 1 and not again:
        width += (2 * policy.context_parallel + 1) * groups
    if shape.num_experts:
        width += shape.experts_per_token * (4 * shape.ffn_size + hidden)
    else:
        width += 3 * shape.ffn_size
    return width // tensor
