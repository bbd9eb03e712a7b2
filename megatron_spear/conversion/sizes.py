"""How many parameters a model has, and a rank's part of it, counted without tensors or torch.

The weight tables (``conversion.families``) say the same name by name; a test compares both.
"""

from dataclasses import dataclass

from megatron_spear.conversion.shape import ModelShape


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that holds the vocabulary."""
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameters of one rank's layers, or of a whole model's, by what happens to them.

    ``linears`` are the matrices of attention and MLP, which may be in FP8, ``rest`` is what is
    always in the model's precision (norms, biases, router, embedding, output layer), ``experts``
    are matrices too, spread over the expert-parallel ranks.
    """

    linears: int
    rest: int
    experts: int

    @property
    def total(self) -> int:
        """All."""
        return self.linears + self.rest + self.experts


def layer_parameters(shape: ModelShape, tensor: int = 1, expert: int = 1) -> Parameters:
    """One decoder layer's on a rank of so many tensor and expert parallel ones.

    Example: hidden 8, 4 heads and 2 groups of 2, ffn 16: 8 x 16 + 8 x 8 + 3 x 8 x 16 = 576 in
    linears, 16 in norms.
    """
    hidden, ffn = shape.hidden_size, shape.ffn_size
    heads, groups = shape.num_heads * shape.head_dim, shape.num_groups * shape.head_dim
    qkv = heads + 2 * groups
    linears = hidden * qkv + heads * hidden
    rest = 2 * hidden
    if shape.qkv_bias:
        rest += qkv // tensor
    if shape.qk_norm:
        rest += 2 * shape.head_dim
    experts = 0
    if shape.num_experts:
        rest += shape.num_experts * hidden  # the router
        experts = shape.num_experts // expert * 3 * hidden * ffn
    else:
        linears += 3 * hidden * ffn
    return Parameters(linears=linears // tensor, rest=rest, experts=experts)


def vocabulary_parameters(shape: ModelShape, tensor: int = 1) -> int:
    """A rank's rows of the embedding or of the output layer, padded to split evenly."""
    return padded_vocab(shape.vocab_size, tensor) // tensor * shape.hidden_size


def stage_parameters(
    shape: ModelShape, stage: int, *, tensor: int = 1, pipeline: int = 1, expert: int = 1
) -> Parameters:
    """What a rank of pipeline stage ``stage`` holds, however its layers are cut into pieces.

    A tied output layer is a copy on the last of several stages, and nothing on a single one.
    """
    layer, layers = layer_parameters(shape, tensor, expert), shape.num_layers // pipeline
    rest, last = layers * layer.rest, stage == pipeline - 1
    if stage == 0:
        rest += vocabulary_parameters(shape, tensor)
    if last:
        rest += shape.hidden_size  # the final norm
        if not shape.tied or pipeline > 1:
            rest += vocabulary_parameters(shape, tensor)
    return Parameters(linears=layers * layer.linears, rest=rest, experts=layers * layer.experts)


def model_parameters(shape: ModelShape) -> Parameters:
    """The whole model's; tied embeddings count once."""
    return stage_parameters(shape, 0)


def active_parameters(shape: ModelShape) -> int:
    """Those a token goes through, the embedding's look-up included: of experts the chosen ones."""
    every = model_parameters(shape)
    share = shape.experts_per_token / shape.num_experts if shape.num_experts else 0.0
    return every.linears + every.rest + round(every.experts * share)
