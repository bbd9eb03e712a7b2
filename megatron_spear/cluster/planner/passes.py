"""Time of the policy's passes over a micro-batch, from products, bytes and exchanges.

A layer's forward pass over T tokens on a rank:

    products     2 T x weights, at the share of the peak that their sides allow
    attention    4 T x keys seen x width, at the kernel's share
    the rest     norms, residuals, rotary positions, gates, sorting by expert: bytes of memory
    exchanges    tensor parallel: 4 of T x hidden; context parallel: keys and values of the others;
                 experts: each token's copies there and back

The backward pass has the products twice, attention 2.5 times, the rest and the exchanges twice.
"""

from dataclasses import dataclass

from megatron_spear.cluster.planner.machines import Machines, Ranks
from megatron_spear.conversion.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """Seconds of a layer's forward and backward pass, exchanges included."""

    forward_s: float
    backward_s: float
    exchange_s: float
    """Of both, what exchanges between ranks take."""


def layer_time(
    model: ModelShape,
    layout: Ranks,
    machines: Machines,
    *,
    tokens: float,
    keys: float,
    fp8: bool = False,
    hidden_exchange: float = 0.0,
) -> LayerTime:
    """A layer over a micro-batch of ``tokens``, of which each sees ``keys`` on average.

    ``hidden_exchange`` is the share of the tensor-parallel exchange that runs beside products.
    """
    constants, tensor = machines.constants, layout.tensor
    own = tokens / layout.context
    width, kv = model.num_heads * model.head_dim, model.num_groups * model.head_dim
    products = _products_s(model, layout, machines, own, fp8)
    flops = 4 * own * keys * width / tensor
    attention = flops / (machines.chip.bf16_flops * constants.attention)
    again = 2.5 * flops / (machines.chip.bf16_flops * constants.attention_backward)
    rest = machines.memory_s(own * _bytes_a_token(model, tensor, fp8))
    extra = constants.experts_layer_s if model.num_experts else 0.0
    exchange = (1 - hidden_exchange) * _tensor_s(model, layout, machines, own)
    exchange += machines.gather_s(4 * own * kv / tensor, layout.context, tensor)
    exchange += _experts_s(model, layout, machines, own)
    forward = max(products + attention + rest, constants.layer_s)
    backward = max(2 * products + again + 2 * rest, 2 * constants.layer_s)
    return LayerTime(
        forward_s=forward + extra + exchange,
        backward_s=backward + extra + 2 * exchange,
        exchange_s=3 * exchange,
    )


def _products_s(
    model: ModelShape, layout: Ranks, machines: Machines, tokens: float, fp8: bool
) -> float:
    hidden, tensor = model.hidden_size, layout.tensor
    width, kv = model.num_heads * model.head_dim, model.num_groups * model.head_dim

    def product(rows: float, inner: float, columns: float) -> float:
        return machines.product_s(rows, inner, columns, fp8=fp8)

    total = product(tokens, hidden, (width + 2 * kv) / tensor)
    total += product(tokens, width / tensor, hidden)
    if not model.num_experts:
        total += product(tokens, hidden, 2 * model.ffn_size / tensor)
        return total + product(tokens, model.ffn_size / tensor, hidden)
    copies = tokens / tensor * model.experts_per_token
    here = model.num_experts / layout.expert
    rows = copies / here
    one = product(rows, hidden, 2 * model.ffn_size) + product(rows, model.ffn_size, hidden)
    return total + here * one + machines.product_s(tokens / tensor, hidden, model.num_experts)


def _bytes_a_token(model: ModelShape, tensor: int, fp8: bool) -> float:
    """Bytes of memory a token moves in a layer's forward pass beside products and attention, with
    sequence parallel wherever there is tensor parallel.

    Norms read and write (4 hidden), residuals (6), rotary positions (2 of queries and keys), the
    gate (3 ffn); of experts' copies four more times there and back. FP8 reads and writes the inputs
    of products once more, in 3 bytes a number.
    """
    hidden, ffn = model.hidden_size, model.ffn_size * max(1, model.experts_per_token)
    width, kv = model.num_heads * model.head_dim, model.num_groups * model.head_dim
    numbers = 10 * hidden + 2 * (width + kv) + 3 * ffn
    if model.num_experts:
        numbers += 8 * hidden * model.experts_per_token
    quantized = 2 * hidden + width + ffn if fp8 else 0
    return (2 * numbers + 3 * quantized) / tensor


def _tensor_s(model: ModelShape, layout: Ranks, machines: Machines, tokens: float) -> float:
    """Gather and scatter around attention and MLP; around experts there is none."""
    part = 2 * tokens / layout.tensor * model.hidden_size
    pairs = 1 if model.num_experts else 2
    return 2 * pairs * machines.gather_s(part, layout.tensor)


def _experts_s(model: ModelShape, layout: Ranks, machines: Machines, tokens: float) -> float:
    """Each token's copies to their experts and back, in bf16."""
    if not model.num_experts:
        return 0.0
    copies = tokens / layout.tensor * model.experts_per_token
    return 2 * machines.all_to_all_s(2 * copies * model.hidden_size, layout.expert)


def head_time(
    model: ModelShape, layout: Ranks, machines: Machines, tokens: float
) -> tuple[float, float]:
    """(forward, backward) seconds of the output layer and the log-probs, in bf16 and float32."""
    own, words = tokens / layout.context, model.vocab_size / layout.tensor
    product = machines.product_s(own, model.hidden_size, words)
    passes = machines.memory_s(own * words * 2 * 3)  # logits written, read twice
    return product + passes, 2 * product + passes


def flops_a_token(model: ModelShape, keys: float) -> float:
    """Model FLOPs of a token's forward pass: 2 a weight it meets, embedding left out, and its
    attention. Training has three times as many."""
    hidden, width = model.hidden_size, model.num_heads * model.head_dim
    kv = model.num_groups * model.head_dim
    ffn = model.ffn_size * max(1, model.experts_per_token)
    layer = hidden * (2 * width + 2 * kv) + 3 * hidden * ffn + hidden * model.num_experts
    weights = model.num_layers * layer + hidden * model.vocab_size
    return 2 * weights + 4 * model.num_layers * keys * width
