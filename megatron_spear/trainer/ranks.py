"""The few small messages between ranks outside the policy: what the controller decided."""

from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_spear.heartbeats.heart import waiting_for

T = TypeVar("T")


def broadcast(value: T) -> T:
    """The controller's (rank 0's) picklable value, on every rank; small values only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    with waiting_for("the controller's word"):
        dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def all_true(value: bool) -> bool:
    """Whether the value is true on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    flag = torch.tensor([int(value)], device=_device())
    with waiting_for("the agreement of all ranks"):
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())


def _device() -> torch.device:
    """Where the default group's tensors live: gloo takes CPU tensors, NCCL the rank's GPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
