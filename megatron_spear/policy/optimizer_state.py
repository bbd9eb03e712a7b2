"""The optimizer's state for checkpoints, whatever the layout, with torch's Adam too.

The distributed optimizer keeps each parameter's state in pieces, one on each data-parallel rank. It
is stored whole, by parameter (Megatron's "fully reshardable" format), so that any layout reads it:
the first data-parallel rank collects and writes it, and each rank reads the parameters of which it
has a piece.
Megatron puts the pieces together without the padding between the buckets of a gradient buffer, and
then cuts parameters out as if it were there: with several buckets (overlapped reduction, tied
embeddings in a pipeline) it stores wrong values. So they are put together here.

Three things of torch's Adam are not in Megatron's plan, and made up for:

- it has no state before its first step, which cannot be stored, nor loaded into: it gets one,
- its count of steps, one a parameter, is not among the stored tensors, and Megatron looks for it
  there; it is stored with the parameter groups, or nowhere if it is 0,
- Megatron hands one tensor with the count to all parameters, and each would count it up.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_spear.policy import offload

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
KINDS = ("param", "exp_avg", "exp_avg_sq")


def is_distributed(optimizer: Any) -> bool:
    """Whether its state is split over the data-parallel ranks."""
    return any(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)


def sharded_state(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> Any:
    """What to store, or with ``loading`` to ask for; ``weights`` are the model's. Collective."""
    _begin(optimizer)
    with _own_gathering(optimizer):
        state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=METADATA)
    if loading:
        _ask_for_own(optimizer, state)
    _count_apart(optimizer)
    return state


def restore(optimizer: Any, state: Any) -> None:
    """Take over what was asked for by ``sharded_state`` and has been loaded."""
    several = len(optimizer.chained_optimizers) > 1
    pieces = []
    for number, part in enumerate(optimizer.chained_optimizers):
        own = state[number] if several else state
        if offload.is_hybrid(part):
            offload.restore(part, own)
        if not _is_torch_adam(part):
            continue
        if isinstance(part, DistributedOptimizer):
            pieces.append((part, own.pop("param_state")))
        else:
            own.get("optimizer", own)["state"].setdefault("common_step", torch.zeros(()))
    if any(map(offload.is_hybrid, optimizer.chained_optimizers)):
        return  # so are all others
    optimizer.load_state_dict(state)  # parameter groups and their count of steps
    for part, tensors in pieces:
        counts = [values.pop("step") for values in part.optimizer.state.values()]
        part.load_parameter_state_from_fully_reshardable(tensors)
        for values, count in zip(part.optimizer.state.values(), counts, strict=True):
            values["step"] = count
    _count_apart(optimizer)


def reload_weights(optimizer: Any) -> None:
    """Take over weights that were loaded into the model without state of the optimizer."""
    optimizer.reload_model_params()
    for part in filter(offload.is_hybrid, optimizer.chained_optimizers):
        offload.reload_weights(part)


@contextlib.contextmanager
def _own_gathering(optimizer: Any) -> Iterator[None]:
    parts = [p for p in optimizer.chained_optimizers if isinstance(p, DistributedOptimizer)]
    hybrids = list(filter(offload.is_hybrid, parts))
    for part in parts:
        part.get_parameter_state_dp_zero = functools.partial(_whole_buffers, part)
    for part in hybrids:
        part.load_state_dict = lambda state: None  # would begin its state, which is begun
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero
        for part in hybrids:
            del part.load_state_dict


def _ask_for_own(optimizer: Any, state: Any) -> None:
    """Leave in what is asked for the parameters of which this rank has a piece.

    The rank with a parameter's first piece counts as the one that reads it (replica 0); Megatron
    wants one of each, and names the group's first rank, which may have none.
    """
    several = len(optimizer.chained_optimizers) > 1
    for number, part in enumerate(optimizer.chained_optimizers):
        if not isinstance(part, DistributedOptimizer):
            continue
        asked = (state[number] if several else state)["param_state"]
        for index, piece in enumerate(_own_pieces(part)):
            if piece is None:
                del asked[index]
                continue
            for tensor in asked[index].values():
                tensor.replica_id = (*tensor.replica_id[:-1], int(piece.start > 0))


def _own_pieces(part: Any) -> Iterator[Any]:
    """For each parameter in the order of what is stored, this rank's range of it, or None."""
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (pieces,) = ranges.values()
        places = {p: place for piece in pieces for p, place in piece["param_map"].items()}
        for parameter in buffer.param_index_map:
            yield places[parameter]["param"] if parameter in places else None


def _whole_buffers(part: Any, *, empty_data: bool, **kwargs: Any) -> dict[int, Any] | None:
    """By number and dtype of a buffer, each kind of state for all of it, padding included; None but
    on the first data-parallel rank. With ``empty_data`` memory for it, on all ranks."""
    first = part.data_parallel_group.rank() == 0
    found: dict[int, Any] = {}
    for number, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, pieces),) = ranges.items()
        # Not zeros: what is not asked for is never touched, so it takes no memory.
        size = buffer.numel if empty_data or first else 0
        whole = {kind: torch.empty(size, device="cpu") for kind in KINDS}
        if not empty_data:
            for bucket, piece in zip(buffer.buckets, pieces, strict=True):
                place = slice(bucket.offset, bucket.offset + bucket.grad_data.numel())
                for kind, values in _gathered(part, bucket, piece["param_map"]):
                    if values is not None:
                        whole[kind][place] = values
        found[number] = {dtype: whole}
    return found if empty_data or first else None


def _gathered(
    part: Any, bucket: Any, places: dict[Any, Any]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """A bucket's state, kind by kind, of the pieces of all data-parallel ranks; None but on the
    first. Collective."""
    group, gradient = part.data_parallel_group, bucket.grad_data
    states = {p: part._get_main_param_and_optimizer_states(p) for p in places}
    for kind in KINDS:
        mine = torch.zeros(gradient.numel() // group.size(), device=gradient.device)
        for parameter, place in places.items():
            local = place["gbuf_local"]
            mine[local.start : local.end] = states[parameter][kind].detach()
        whole, parts = None, None
        if group.rank() == 0:
            whole = torch.empty(gradient.numel(), device=gradient.device)
            parts = list(whole.chunk(group.size()))
        dist.gather(mine, parts, dst=dist.get_global_rank(group, 0), group=group)
        yield kind, whole


def _begin(optimizer: Any) -> None:
    """Give parameters that torch's Adam has not updated yet the state it would begin with."""
    for part in filter(offload.is_hybrid, optimizer.chained_optimizers):
        offload.begin(part)
    for part in _torch_adams(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if "step" not in state:
                    device = parameter.device if group["fused"] else "cpu"
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def _count_apart(optimizer: Any) -> None:
    """A count of steps of its own for each parameter."""
    for part in _torch_adams(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _torch_adams(optimizer: Any) -> Iterator[Any]:
    return (part for part in optimizer.chained_optimizers if _is_torch_adam(part))


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part.optimizer, torch.optim.Adam)
