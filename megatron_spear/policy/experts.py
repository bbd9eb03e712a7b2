"""A mixture of experts in place of a layer's MLP: Megatron's layer with whole experts on each rank.

    norm -> router -> all-to-all to the experts' ranks -> experts -> all-to-all back -> weighted sum

Expert parallelism spreads the experts over the ranks of a pipeline stage, tensor parallel ones
first, so an expert is never split: under tensor parallelism every rank brings its own part of the
sequence. Nothing is dropped and there is no auxiliary loss, so the loss stays a plain sum over
tokens.
"""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.policy.layers import GatedMlp


class Experts(SequentialMLP):  # type: ignore[misc]
    """This rank's experts, one after the other.

    Their gradients are summed over the ranks that hold the same experts. Megatron 0.16 takes the
    data-parallel ranks for these if there is no expert parallelism, which under tensor parallelism
    leaves out some.
    """

    def __init__(self, num_local_experts: int, config: Any, **kwargs: Any) -> None:
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(num_local_experts, config, submodules=linear, **kwargs)
        for expert in self.local_experts:
            GatedMlp.adopt(expert)
        for parameter in self.parameters():
            parameter.allreduce = False  # Megatron's word for an expert's parameter


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router without its only function that torch would compile, for an unused bias."""

    def _apply_expert_bias(self, *args: Any, **kwargs: Any) -> None: ...


def experts_spec() -> ModuleSpec:
    """The layer in place of the MLP."""
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=Experts, router=Router))


def experts_config(shape: ModelShape, expert_parallel: int) -> dict[str, Any]:
    """What ``TransformerConfig`` needs for a model with experts.

    Softmax over the chosen logits is softmax over all, made to sum to 1: Megatron chooses between
    the two by the order of softmax and choice.
    """
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.ffn_size,
        "moe_router_topk": shape.experts_per_token,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not shape.normalize_routing,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": expert_parallel,
        "expert_tensor_parallel_size": 1,
    }
