"""The optimizer's state for checkpoints, whatever the layout, with torch's Adam too.

The distributed optimizer keeps each parameter's state in pieces, one on each data-parallel rank. It
is stored whole, by parameter (Megatron's "fully reshardable" format), so that any layout reads it.
Three things of torch's Adam are not in Megatron's plan, and made up for here:

- it has no state before its first step, which cannot be stored, nor loaded into: it gets one,
- its count of steps, one a parameter, is not among the stored tensors, and Megatron looks for it
  there; it is stored with the parameter groups,
- Megatron hands one tensor with the count to all parameters, and each would count it up.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(optimizer: Any, weights: dict[str, Any], *, loading: bool) -> Any:
    """What to store, or with ``loading`` to ask for; ``weights`` are the model's. Collective."""
    _begin(optimizer)
    state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=METADATA)
    _count_apart(optimizer)
    return state


def restore(optimizer: Any, state: Any) -> None:
    """Take over what was asked for by ``sharded_state`` and has been loaded."""
    several = len(optimizer.chained_optimizers) > 1
    pieces = []
    for number, part in enumerate(optimizer.chained_optimizers):
        if isinstance(part, DistributedOptimizer) and _is_torch_adam(part):
            own = state[number] if several else state
            pieces.append((part, own.pop("param_state")))
    optimizer.load_state_dict(state)  # parameter groups and their count of steps
    for part, tensors in pieces:
        counts = [values.pop("step") for values in part.optimizer.state.values()]
        part.load_parameter_state_from_fully_reshardable(tensors)
        for values, count in zip(part.optimizer.state.values(), counts, strict=True):
            values["step"] = count
    _count_apart(optimizer)


def _begin(optimizer: Any) -> None:
    """Give parameters that torch's Adam has not updated yet the state it would begin with."""
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
