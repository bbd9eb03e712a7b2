"""Time of the trainer's part of a step: optimizer steps over all rows, and log-prob passes."""

from dataclasses import dataclass, replace
from math import ceil

from megatron_spear.cluster.planner.machines import Machines, Ranks
from megatron_spear.cluster.planner.passes import flops_a_token, head_time, layer_time
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import stage_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """How the policy trains.

    ``microbatch_tokens`` are those of a data-parallel rank, shared by its context-parallel ones;
    ``keys`` what a token sees on average. ``hidden_exchange``: share of the tensor-parallel
    exchange that runs beside products (this project's policy: none).
    """

    model: ModelShape
    ranks: Ranks
    machines: Machines
    microbatch_tokens: float
    keys: float
    fp8: bool = False
    recompute: bool = False
    grad_bytes: int = 4
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_optimizer: bool = True
    offload: float = 0.0
    hidden_exchange: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Seconds of the trainer's work on some tokens, and what they are made of."""

    total_s: float
    work_s: float
    """Products, attention and the rest of a rank's share, no waiting, no exchange."""
    exchange_s: float
    """Between ranks within a micro-batch."""
    bubble_s: float
    """The pipeline's beginning and end, and its slowest stage's lead over the others."""
    reduce_s: float = 0.0
    """Gradients and weights between data-parallel ranks, as far as nothing hides it."""
    optimizer_s: float = 0.0
    """The optimizer's update."""


def train_time(trainer: Trainer, tokens: float, updates: int = 1) -> Passes:
    """Training on ``tokens`` in all, in ``updates`` optimizer steps."""
    stage = _stage(trainer)
    per_update = tokens / updates / trainer.ranks.data
    count = max(1, ceil(per_update / trainer.microbatch_tokens))
    fill = per_update / (count * trainer.microbatch_tokens)
    passes = _pipelined(trainer, count, stage.forward_s + stage.backward_s, stage.head_s)
    reduce_s = _reduce_s(trainer, stage.forward_s * fill, stage.backward_s * fill)
    optimizer_s = _optimizer_s(trainer)
    exchange = count * stage.exchange_s
    total = passes.total_s * fill + reduce_s + optimizer_s
    return Passes(
        total_s=updates * total,
        work_s=updates * fill * (passes.work_s - exchange),
        exchange_s=updates * fill * exchange,
        bubble_s=updates * fill * passes.bubble_s,
        reduce_s=updates * reduce_s,
        optimizer_s=updates * optimizer_s,
    )


def logprob_time(trainer: Trainer, tokens: float) -> Passes:
    """A pass without gradient over ``tokens`` in all."""
    stage = _stage(replace(trainer, recompute=False))
    per_rank = tokens / trainer.ranks.data
    count = max(1, ceil(per_rank / trainer.microbatch_tokens))
    fill = per_rank / (count * trainer.microbatch_tokens)
    passes = _pipelined(trainer, count, stage.forward_s, stage.head_forward_s)
    exchange = count * stage.exchange_s / 3
    return Passes(
        total_s=passes.total_s * fill,
        work_s=fill * (passes.work_s - exchange),
        exchange_s=fill * exchange,
        bubble_s=fill * passes.bubble_s,
    )


def model_flops(trainer: Trainer, tokens: float) -> float:
    """Model FLOPs of training on ``tokens``, recomputation not counted."""
    return 3 * tokens * flops_a_token(trainer.model, trainer.keys)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stage:
    """A pipeline rank's share of a micro-batch, without and with the output layer."""

    forward_s: float
    backward_s: float
    head_s: float
    head_forward_s: float
    exchange_s: float


def _stage(trainer: Trainer) -> _Stage:
    layers = trainer.model.num_layers / trainer.ranks.pipeline
    one = layer_time(
        trainer.model,
        trainer.ranks,
        trainer.machines,
        tokens=trainer.microbatch_tokens,
        keys=trainer.keys,
        fp8=trainer.fp8,
        hidden_exchange=trainer.hidden_exchange,
    )
    head = head_time(trainer.model, trainer.ranks, trainer.machines, trainer.microbatch_tokens)
    again = one.forward_s if trainer.recompute else 0.0
    exchange = one.exchange_s * (4 / 3 if trainer.recompute else 1)
    return _Stage(
        forward_s=layers * one.forward_s,
        backward_s=layers * (one.backward_s + again),
        head_s=sum(head),
        head_forward_s=head[0],
        exchange_s=layers * exchange,
    )


def _pipelined(trainer: Trainer, count: int, stage_s: float, head_s: float) -> Passes:
    """``count`` micro-batches through the pipeline, whose last stage has the head as well."""
    ranks, machines = trainer.ranks, trainer.machines
    pipeline, virtual = ranks.pipeline, ranks.virtual
    hidden = 2 * trainer.microbatch_tokens * trainer.model.hidden_size
    hidden /= ranks.tensor * ranks.context
    sends = 2 * virtual if pipeline > 1 else 0
    send_s = sends * hidden / machines.rate(pipeline, ranks.stage_size)
    slowest = stage_s + head_s + send_s
    mean = stage_s + head_s / pipeline + send_s
    total = count * slowest + (pipeline - 1) / virtual * mean
    work = count * mean
    return Passes(total_s=total, work_s=work, exchange_s=0.0, bubble_s=total - work)


def _parameters_here(trainer: Trainer) -> tuple[float, float]:
    """(dense, experts') parameters of a rank of the first stage."""
    ranks = trainer.ranks
    own = stage_parameters(
        trainer.model, 0, tensor=ranks.tensor, pipeline=ranks.pipeline, expert=ranks.expert
    )
    return own.linears + own.rest, own.experts


def _reduce_s(trainer: Trainer, forward_s: float, backward_s: float) -> float:
    """Gradients scattered and weights gathered, less what the last backward and the next forward
    pass hide."""
    layout, machines = trainer.ranks, trainer.machines
    dense, experts = _parameters_here(trainer)
    copies = layout.data * layout.context
    expert_copies = layout.stage_size / layout.expert
    scatter = gather = 0.0
    for parameters, ranks, stride in (
        (dense, copies, layout.tensor),
        (experts, round(expert_copies), layout.expert),
    ):
        scatter += machines.gather_s(trainer.grad_bytes * parameters / ranks, ranks, stride)
        gather += machines.gather_s(2 * parameters / ranks, ranks, stride)
    if not trainer.distributed_optimizer:
        gather = scatter  # an all-reduce is a scatter and a gather of gradients
    if trainer.overlap_grad_reduce:
        scatter = max(0.0, scatter - backward_s)
    if trainer.overlap_param_gather:
        gather = max(0.0, gather - forward_s)
    return scatter + gather


ADAM_BYTES = 4 + 2 * 12 + 2
"""Bytes of memory an Adam update moves a parameter: the gradient, master weight and moments read
and written, the weight in bf16."""
HOST_ADAM_BYTES_PER_S = 20e9
"""Memory bandwidth of a CPU's Adam, a GPU's share of the cores (assumed)."""


def _optimizer_s(trainer: Trainer) -> float:
    layout, machines = trainer.ranks, trainer.machines
    dense, experts = _parameters_here(trainer)
    if trainer.distributed_optimizer:
        dense /= layout.data * layout.context
        experts /= layout.stage_size / layout.expert
    count = dense + experts
    on_gpu = machines.memory_s(ADAM_BYTES * count * (1 - trainer.offload))
    moved = count * trainer.offload
    bus = machines.chip.pcie_bytes_per_s * machines.constants.host
    return on_gpu + moved * (6 / bus + ADAM_BYTES / HOST_ADAM_BYTES_PER_S)
