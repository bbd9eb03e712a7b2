"""The layouts that tests compare with one rank, and what of a policy they compare."""

from typing import Any

import numpy as np
import torch.distributed as dist

TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
CP2 = {"context_parallel": 2}
VPP2 = {"pipeline_parallel": 2, "virtual_pipeline": 2}
SPLIT = {"distributed_optimizer": True}
OVERLAPPED = SPLIT | {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}

DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_parallel": 2}),
    "PP2": (2, {"pipeline_parallel": 2}),
    "DP2": (2, {}),
    "TP2+SP": (2, TP2),
    "TP2xPP2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "TP2xDP2+SP": (4, TP2),
    "PP2xDP2": (4, {"pipeline_parallel": 2}),
    "TP2+SP, recompute": (2, TP2 | FULL),
    "PP2xVPP2": (2, VPP2),
    "DP2, distributed": (2, SPLIT),
    "CP2, recompute": (2, CP2 | SELECTIVE),
    "CP2, distributed": (2, CP2 | SPLIT),
    "CP2xDP2": (4, CP2),
    "TP2xCP2+SP": (4, TP2 | CP2),
    "CP2xPP2xVPP2": (4, CP2 | VPP2),
    "TP2xPP2xVPP2+SP, recompute": (4, TP2 | VPP2 | FULL),
    "PP2xVPP2xDP2, distributed, overlapped, recompute": (4, VPP2 | OVERLAPPED | SELECTIVE),
    "TP2xDP2+SP, distributed, overlapped, recompute": (4, TP2 | OVERLAPPED | FULL),
}
"""Number of ranks and ``policy.*`` of each, by name."""

EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"expert_parallel": 2}),
    "DP2": (2, {}),
    "TP2": (2, TP2),
    "TP2, its ranks the experts'": (2, {"expert_parallel": 2, **TP2}),
    "EP2xTP2": (4, {"expert_parallel": 2, **TP2}),
    "EP2, context parallel ranks": (2, {"expert_parallel": 2} | CP2),
    "EP4xTP2xCP2": (4, {"expert_parallel": 4} | CP2 | TP2),
    "EP4": (4, {"expert_parallel": 4, **TP2}),
    "EP2xPP2": (4, {"expert_parallel": 2, "pipeline_parallel": 2}),
    "EP2, recompute": (2, {"expert_parallel": 2} | FULL),
    "EP2xPP2xVPP2, recompute": (4, {"expert_parallel": 2} | VPP2 | SELECTIVE),
    "EP2xTP2, distributed, overlapped, recompute": (
        4,
        {"expert_parallel": 2} | TP2 | OVERLAPPED | FULL,
    ),
}
"""The same for models with experts."""


def exported(policy: Any) -> dict[str, np.ndarray]:
    """The weights by Hugging Face name, on rank 0; collective."""
    return {n: t.numpy().copy() for n, t in policy.export_weights() if t is not None}


def exported_gradient(policy: Any) -> dict[str, np.ndarray]:
    """The gradient of the last step, clipped if the step was, by way of the weight export;
    collective."""
    from megatron_spear.policy.weights import export_hf

    gather_gradient(policy)
    parameters = policy._parameters()
    kept = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad
    tensors = export_hf(policy._chunks, policy.shape, policy.ctx)
    result = {name: tensor.numpy().copy() for name, tensor in tensors if tensor is not None}
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data = data
    return result


def gather_gradient(policy: Any) -> None:
    """Put together what a distributed optimizer leaves in pieces; collective."""
    if not policy._policy.distributed_optimizer:
        return
    for model in policy._model:
        for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                pieces = list(bucket.grad_data.view(ranks.size(), -1))
                dist.all_gather(pieces, pieces[ranks.rank()].clone(), group=ranks)


def worst(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference of two sets of tensors, which have the same names."""
    assert set(ours) == set(theirs)
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
