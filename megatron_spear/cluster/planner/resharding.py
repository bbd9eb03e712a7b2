"""Bytes and seconds of a weight update, in closed form.

``weight_sync/plan.py`` says exactly who sends what; for 1,024 ranks that takes seconds, and torch.
Here is what comes out of it: each engine rank receives just what it needs, and the ranks of a
pipeline stage share evenly what their layers' tensors are sent for. A test holds the two together.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_spear.cluster.planner.engine_memory import engine_weights
from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.machines import Machines, Ranks, machines_of, ranks_of
from megatron_spear.conversion.shape import ModelShape

WHOLE_BYTES_PER_S = 10e9
"""Bytes a second of updates that stream whole tensors from one rank, gathering included. NeMo-RL
0.3, Llama 3.1 70B on 64 H100: 141 GB in 14 s (github.com/NVIDIA-NeMo/RL, issue 959). Others are
between half of it (verl) and twice (miles)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resharding:
    """A weight update: bytes, and seconds.

    ``needed_bytes`` is the least any way has to bring to all engine ranks together; ``total_bytes``
    is what travels.
    """

    needed_bytes: float
    total_bytes: float
    most_sent_bytes: float
    most_received_bytes: float
    floor_s: float
    """The most that a rank sends or receives over its link at its full rate."""
    seconds: float


def resharding(job: Job) -> Resharding:
    """The job's weight update. All transports but ``sharded`` stream whole tensors."""
    return reshard(
        job.shape,
        ranks_of(job),
        machines_of(job),
        tensor=job.engine_tensor_parallel,
        replicas=job.num_engines,
        transport="sharded" if job.weight_sync.transport == "sharded" else "whole",
        fp8=job.weight_sync.precision == "fp8",
        same_nodes=job.shares_gpus,
    )


def reshard(
    model: ModelShape,
    training: Ranks,
    machines: Machines,
    *,
    tensor: int,
    replicas: int,
    transport: Literal["sharded", "whole"],
    fp8: bool = False,
    same_nodes: bool = False,
    sends: int | None = None,
) -> Resharding:
    """The update of ``replicas`` engines of ``tensor`` ranks; ``same_nodes``: on the nodes that
    train. ``sends``: times that whole tensors leave the sender; None = once a replica."""
    layer = _needed_of_a_layer(model, tensor, fp8)
    ends = _needed_of_the_ends(model)
    received = (model.num_layers * layer + sum(ends)) / tensor
    needed = received * tensor * replicas
    chip, constants = machines.chip, machines.constants
    link = chip.nvlink_bytes_per_s if same_nodes else chip.nic_bytes_per_s
    launches_s = model.num_layers * constants.sync_layer_s
    if transport == "whole":
        whole = engine_weights(model, fp8=fp8)
        total = whole * (replicas if sends is None else sends)
        return Resharding(
            needed_bytes=needed,
            total_bytes=total,
            most_sent_bytes=total,
            most_received_bytes=whole,
            floor_s=total / link,
            seconds=launches_s + max(whole / WHOLE_BYTES_PER_S, total / link),
        )
    sent = replicas * _of_the_fullest_stage(model, training, layer, ends)
    sent /= training.stage_size
    share = constants.inside_node if same_nodes else constants.between_nodes
    floor_s = max(sent, received) / link
    return Resharding(
        needed_bytes=needed,
        total_bytes=needed,
        most_sent_bytes=sent,
        most_received_bytes=received,
        floor_s=floor_s,
        seconds=launches_s + floor_s / share,
    )


def _needed_of_a_layer(model: ModelShape, tensor: int, fp8: bool) -> float:
    """Bytes of a layer that the ranks of one engine need, all together. What is not split goes to
    each of them, and so do keys and values of fewer groups than ranks."""
    width, kv = model.num_heads * model.head_dim, model.num_groups * model.head_dim
    size = _linear_bytes(fp8)
    copies = max(1, tensor // model.num_groups)
    split = size * model.hidden_size * (2 * width + 2 * kv * copies)
    split += size * 3 * model.hidden_size * model.ffn_size * max(1, model.num_experts)
    whole = 2 * model.hidden_size * (2 + model.num_experts)
    whole += 4 * model.head_dim if model.qk_norm else 0
    bias = 2 * (width + 2 * kv * copies) if model.qkv_bias else 0
    return split + bias + tensor * whole


def _needed_of_the_ends(model: ModelShape) -> tuple[float, float]:
    """Bytes of the embedding and of the output layer; the last norm is left out."""
    words = 2.0 * model.vocab_size * model.hidden_size
    return words, 0.0 if model.tied else words


def _linear_bytes(fp8: bool) -> float:
    """Bytes a weight of a linear layer; FP8 with a float32 scale for 128 x 128."""
    return 1 + 4 / (128 * 128) if fp8 else 2.0


def _of_the_fullest_stage(
    model: ModelShape, training: Ranks, layer: float, ends: tuple[float, float]
) -> float:
    layers = model.num_layers / training.pipeline * layer
    if training.pipeline == 1:
        return layers + sum(ends)
    return layers + max(ends)
