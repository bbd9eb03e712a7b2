"""What a training rank holds between the passes of a micro-batch, and for a moment in them.

**Kept** is what autograd keeps of a micro-batch of T tokens; context parallel c leaves a rank T / c
of them, which is T below. Heads, groups and the MLP are split over t tensor parallel ranks, and
``hidden`` too under sequence parallelism. With H = heads d and G = groups d a layer keeps of each
token:

    4 hidden        the inputs of both norms, and what they give
    H               the attention's result, the input of the next linear layer
    3 ffn           gate and up, and the input of the down projection

and in the attention, where tokens stay packed (half precision on a GPU)

    H + 2 G         query, key and value in one, as they come (the value is a view of it)
    H               the query alone, where it is read again (a copy, if a rank has several groups)
    H + G           query and key after rotary positions, which the kernel keeps
    (2 c + 1) G     with c > 1, the keys and values it has gathered

or where they are laid out, one sequence a row (on a CPU, and in float32; padding not counted)

    H + 2 c G       query, key and value after rotary positions, which the kernel keeps
    H               the kernel's result, before it is packed again
    2 H + 2 G       with norms on query and key: query, key and value as they come, and the query
                    alone (H less if a rank has one group)

The query is read again by norms on query and key, and by recomputation. With experts, of which k
see a token, the last line above is ``k (4 ffn + hidden)``: what goes in, gate and up, and their
product before and after the router's weight, if the router spreads tokens evenly.

- ``recompute=selective`` keeps query, key and value as they come in place of those the kernel
  keeps. Packed, that saves G with several groups a rank, H + G with one, and nothing with norms on
  query and key, whose results are kept then: the kernel keeps no square of scores, for which
  Megatron made this.
- ``recompute=full`` keeps a layer's input alone, and once the rest of the layer that is just
  computed again.

A pipeline rank has several micro-batches between their passes (``units_in_flight``), each with what
it sends on; the last stage also has the final norm's input and result.

**Work** is what else is there at the worst moment, the largest of

    logits          with their gradient, and where torch computes it (not Triton on a GPU) two
                    pieces of 16 MiB; then that gradient with the output layer's own
    a layer's backward pass     4 ffn + 2 hidden a token, or less with the gradient of its weight;
                    and the sequence gathered, and its gradient, under sequence parallelism
    the embedding's gradient    vocabulary x hidden, when a micro-batch's activations are gone

Norms' scales, the softmax's denominators, the router's probabilities and what gloo or NCCL holds
are left out. Tests compare what is kept with what autograd keeps of real layers, and the whole with
the live bytes of training ranks (docs/planner.md).
"""

from dataclasses import dataclass

from megatron_spear.cluster.planner.states import WEIGHT_BYTES
from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import padded_vocab, vocabulary_parameters

LOGPROBS_SCRATCH_BYTES = 2 * 2**24
"""Two pieces of ``algorithms.logprobs.SCRATCH_BYTES`` in its backward pass without Triton."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of one rank: what is kept, and the largest work beside it, with its name.

    ``forward`` is the work of a pass without gradients, which keeps nothing.
    """

    kept: int
    work: int
    binds: str
    forward: int

    @property
    def total(self) -> int:
        """At the worst moment."""
        return self.kept + self.work


def activations(
    shape: ModelShape,
    policy: PolicySection,
    stage: int,
    *,
    packed: bool,
    microbatches: int | None = None,
) -> Activations:
    """Of each rank of pipeline stage ``stage``.

    Args:
        shape: the model.
        policy: the layout.
        stage: the pipeline stage.
        packed: whether attention runs on packed tokens (half precision on a GPU).
        microbatches: micro-batches of a step; None = enough to fill the pipeline.
    """
    each = WEIGHT_BYTES[policy.precision]
    tokens = policy.tokens_per_microbatch // policy.context_parallel
    last = stage == policy.pipeline_parallel - 1
    width = _hidden(shape, policy)
    units = units_in_flight(policy, stage, microbatches)
    layers = shape.num_layers // (policy.pipeline_parallel * policy.virtual_pipeline)
    unit = layers * kept_a_token(shape, policy, packed=packed)
    if not last or policy.virtual_pipeline > 1:
        unit += width  # what it sends on
    one = each * tokens * unit
    kept = units * one + (each * tokens * 2 * width if last else 0)
    logits = each * tokens * (padded_vocab(shape.vocab_size, policy.tensor_parallel))
    logits //= policy.tensor_parallel
    table = each * vocabulary_parameters(shape, policy.tensor_parallel)
    layer = _layer_work(shape, policy, tokens, packed=packed)
    moments = {"a layer's backward pass": layer}
    if last:
        scratch = 0 if packed else min(LOGPROBS_SCRATCH_BYTES, 2 * logits)
        moments["logits"] = max(2 * logits + scratch, logits + table + each * tokens * width)
    if stage == 0:
        moments["the embedding's gradient"] = table + each * tokens * width - one
    binds = max(moments, key=lambda name: moments[name])
    forward = logits + scratch if last else 0
    return Activations(kept=kept, work=moments[binds], binds=binds, forward=max(forward, layer))


def units_in_flight(policy: PolicySection, stage: int, microbatches: int | None = None) -> int:
    """Pieces of the model x micro-batches that are between their passes at once, at most.

    Plain: one for each stage from this to the last. Interleaved, as Megatron's
    ``get_pp_rank_microbatches`` has it: with p stages of v pieces, 2 (p - 1 - stage) + (v - 1) p
    forward passes come first, and one more before a backward pass.

    Example: stage 0 of 4 with 2 pieces each: 6 + 4 + 1 = 11, of 8 pieces in all.
    """
    pipeline, pieces = policy.pipeline_parallel, policy.virtual_pipeline
    if pieces == 1:
        units = pipeline - stage
    else:
        units = 2 * (pipeline - 1 - stage) + (pieces - 1) * pipeline + 1
    return units if microbatches is None else min(units, microbatches * pieces)


def kept_a_token(shape: ModelShape, policy: PolicySection, *, packed: bool = True) -> int:
    """Numbers that a layer keeps of one token on a rank, between its two passes."""
    hidden, tensor = _hidden(shape, policy), policy.tensor_parallel
    if policy.recompute == "full":
        return hidden
    width = 4 * hidden + _attention(shape, policy, packed=packed) // tensor
    if shape.num_experts:
        # each rank brings its part of the sequence to the experts
        inner = shape.experts_per_token * (4 * shape.ffn_size + shape.hidden_size)
    else:
        inner = 3 * shape.ffn_size
    return width + inner // tensor


def _attention(shape: ModelShape, policy: PolicySection, *, packed: bool) -> int:
    """Of all tensor parallel ranks."""
    heads, groups = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    again, context = policy.recompute == "selective", policy.context_parallel
    reads_again = again or shape.qk_norm
    width = heads
    if reads_again and shape.num_groups > policy.tensor_parallel:
        width += heads  # the copied query
    if packed or reads_again:
        width += heads + 2 * groups  # as they come
    if again:
        return width + (heads + groups if shape.qk_norm else 0)
    if not packed:
        return width + heads + (heads + 2 * context * groups)
    width += heads + groups
    return width + ((2 * context + 1) * groups if context > 1 else 0)


def _hidden(shape: ModelShape, policy: PolicySection) -> int:
    """Numbers of a token of the residual stream on a rank."""
    return shape.hidden_size // (policy.tensor_parallel if policy.sequence_parallel else 1)


def _layer_work(shape: ModelShape, policy: PolicySection, tokens: int, *, packed: bool) -> int:
    """Bytes of a layer's backward pass beside what is kept, the layer computed again included."""
    tensor, hidden = policy.tensor_parallel, _hidden(shape, policy)
    ffn = shape.ffn_size * max(shape.experts_per_token, 1) // tensor
    weight = 2 * shape.hidden_size * shape.ffn_size // (1 if shape.num_experts else tensor)
    width = max(4 * ffn * tokens, 2 * ffn * tokens + weight) + 2 * hidden * tokens
    if policy.sequence_parallel:
        width += 2 * shape.hidden_size * tokens
    if policy.recompute == "full":
        plain = policy.model_copy(update={"recompute": "none"})
        width += (kept_a_token(shape, plain, packed=packed) - hidden) * tokens
    return WEIGHT_BYTES[policy.precision] * width
