"""The few small messages between ranks outside the policy: what the controller decided.

They go over gloo: a rank that waits for the controller's rollouts in an NCCL kernel would keep its
GPU busy, of which servers on the same GPU have need.
"""

from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_spear.heartbeats.heart import waiting_for
from megatron_spear.policy.parallel import control_group

T = TypeVar("T")

_CPU = torch.device("cpu")


def broadcast(value: T) -> T:
    """The controller's (rank 0's) picklable value, on every rank; small values only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    with waiting_for("the controller's word"):
        dist.broadcast_object_list(box, src=0, group=control_group(), device=_CPU)
    return box[0]


def all_true(value: bool) -> bool:
    """Whether the value is true on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    flag = torch.tensor([int(value)])
    with waiting_for("the agreement of all ranks"):
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=control_group())
        return bool(flag.item())
