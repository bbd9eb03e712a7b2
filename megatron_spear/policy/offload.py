"""Adam's state and update of a share of the parameters on the CPU (``policy.optimizer_offload``).

Megatron's ``HybridDeviceOptimizer`` gives each offloaded parameter a float32 copy in host memory
with an Adam of its own there; a step copies the gradient down and the new weight back up. It is
made for the distributed optimizer in half precision. As it stands (0.16.1 and 0.19.2 alike)

- with another optimizer its state cannot be loaded,
- in float32 a step skips what stays on the GPU if gradients are decoupled from parameters (the
  "precision-aware" way, which is the one for bf16), and loading raises KeyError,
- the first load makes a step with a random gradient, after the weights were loaded,
- weights that are loaded without optimizer state do not reach the float32 copies.

So it is used with the distributed optimizer only, gradients are decoupled in bf16 only, and state
is put in place here. What is stored is what any distributed optimizer stores.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_spear.config.schema import PolicySection

_MOMENTS = ("exp_avg", "exp_avg_sq")


def settings(policy: PolicySection) -> dict[str, Any]:
    """Megatron's settings for the share that is asked for; none for 0."""
    if not policy.optimizer_offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": policy.optimizer_offload,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def prepare(config: OptimizerConfig) -> None:
    """Let Megatron leave the float32 weights of bf16 training to the offloading optimizer.

    That is its ``use_precision_aware_optimizer``, which 0.16.1 refuses without TransformerEngine,
    though that has no part in it; what it stands for is set here.
    """
    if config.optimizer_cpu_offload and config.bf16:
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True


def decouples_gradients(config: OptimizerConfig) -> bool:
    """Whether gradients are in ``decoupled_grad`` instead of ``grad``."""
    return bool(config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)


def is_hybrid(part: Any) -> bool:
    """Whether a part of Megatron's chained optimizer updates some parameters on the CPU."""
    return isinstance(part.optimizer, HybridDeviceOptimizer)


def clean_groups(part: Any) -> None:
    """Take what is no setting of Adam out of the parameter groups, which checkpoints store."""
    own = set(part.optimizer.defaults) - set(torch.optim.AdamW([torch.zeros(())]).defaults)
    for group in part.optimizer.param_groups:
        for name in own:
            group.pop(name, None)


def begin(part: Any) -> None:
    """Give parameters that were not updated yet the state that Adam would begin with."""
    for adam, parameter in _parameters(part.optimizer):
        state = adam.state[parameter]
        if isinstance(adam, torch.optim.Adam) and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in _MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
    part.optimizer._sync_sub_optimizers_state_to_hdo()


def restore(part: Any, own: dict[str, Any]) -> None:
    """Put loaded state in place; ``own`` is what ``sharded_state_dict`` asked for."""
    hybrid = part.optimizer
    (count,) = {float(group["step"]) for group in own["optimizer"]["param_groups"]}

    def put(model_parameter: Any, tensors: dict[str, Any]) -> None:
        group, place = part.model_param_group_index_map[model_parameter]
        parameter = hybrid.param_groups[group]["params"][place]
        hybrid.param_to_inner_param[parameter].data.copy_(tensors["param"])
        for name in _MOMENTS:
            hybrid.state[parameter][name].copy_(tensors[name])

    part._set_main_param_and_optimizer_states = put
    hybrid._sync_hdo_state_to_sub_optimizers = lambda: None  # all of it is in place
    try:
        part.load_parameter_state_from_fully_reshardable(own["param_state"])
    finally:
        del part._set_main_param_and_optimizer_states
        del hybrid._sync_hdo_state_to_sub_optimizers
    for adam in hybrid.sub_optimizers:
        if not isinstance(adam, torch.optim.Adam):  # TransformerEngine's and apex's count by group
            for group in adam.param_groups:
                group["step"] = int(count)
    for state in hybrid.state.values():
        if "step" in state:
            state["step"].fill_(count)


def reload_weights(part: Any) -> None:
    """Take over weights that were loaded into the model."""
    for parameter, inner in part.optimizer.param_to_inner_param.items():
        if inner is not parameter:
            inner.data.copy_(parameter.data)


def _parameters(hybrid: HybridDeviceOptimizer) -> Iterator[tuple[Any, torch.Tensor]]:
    """Each inner parameter with the optimizer that updates it."""
    for adam in hybrid.sub_optimizers:
        for group in adam.param_groups:
            for parameter in group["params"]:
                yield adam, parameter
