"""The model's layers of TransformerEngine (TE), by Megatron's wrappers around it.

The norm before a linear is part of it: ``linear_qkv`` and a dense layer's ``linear_fc1`` hold it as
``layer_norm_weight``, which is its name in checkpoints of local layers too. Experts are two grouped
linears. Attention runs on packed tokens ("thd"); under context parallelism it is this package's own
(``context_attention``). Weight tables know the local layers' names, which ``weights.local_name``
translates to.

For where TE is installed; imported when it has been chosen (``implementation``).
"""

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.data.packing import TrainBatch
from megatron_spear.policy.attention import PackedLayout, Rotary, turn
from megatron_spear.policy.context_attention import ContextAttention
from megatron_spear.policy.experts import Router


def block_spec(
    shape: ModelShape, policy: PolicySection, num_layers: int
) -> TransformerBlockSubmodules:
    """``num_layers`` layers and the final norm."""
    return TransformerBlockSubmodules(
        layer_specs=[_layer(shape, policy)] * num_layers, layer_norm=TENorm
    )


def _layer(shape: ModelShape, policy: PolicySection) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=TELayerNormColumnParallelLinear,
            core_attention=ContextAttention if policy.context_parallel > 1 else TurnedAttention,
            linear_proj=TERowParallelLinear,
            q_layernorm=TENorm if shape.qk_norm else IdentityOp,
            k_layernorm=TENorm if shape.qk_norm else IdentityOp,
        ),
    )
    linears = {"linear_fc1": TELayerNormColumnParallelLinear, "linear_fc2": TERowParallelLinear}
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(**linears))
    experts = MoESubmodules(experts=GroupedExperts, router=Router)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TENorm if shape.num_experts else IdentityOp,
            mlp=ModuleSpec(module=MoELayer, submodules=experts) if shape.num_experts else mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class GroupedExperts(TEGroupedMLP):  # type: ignore[misc]
    """This rank's experts as two grouped linears.

    An expert is whole on its rank. Its gradient is summed over the ranks that hold the same experts
    (``allreduce`` is Megatron's word for the opposite) and each tensor-parallel rank counts its own
    in the gradient's norm; Megatron and TE say both only in some layouts.
    """

    def __init__(self, num_local_experts: int, config: Any, **kwargs: Any) -> None:
        linears = MLPSubmodules(
            linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
        )
        super().__init__(num_local_experts, config, submodules=linears, **kwargs)
        for axis, linear in enumerate((self.linear_fc1, self.linear_fc2)):
            for weight in linear.parameters():
                weight.allreduce = False
                weight.tensor_model_parallel = True
                weight.partition_dim, weight.partition_stride = axis, 1


class TurnedAttention(TEDotProductAttention):  # type: ignore[misc]
    """TE's attention after rotary positions: queries, keys, values ``[T, heads, D]`` in."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert isinstance(packed_seq_params, PackedLayout), "every batch comes with its layout"
        return super().forward(
            turn(query, packed_seq_params),
            turn(key, packed_seq_params),
            value,
            attention_mask,
            *args,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )


def layout_of(batch: TrainBatch, rotary: Rotary) -> PackedLayout:
    """Where sequences begin, and the angle of each of this rank's tokens by its position."""
    cos, sin = (
        table.index_select(0, batch.position_ids) for table in rotary.tables(batch.max_seqlen)
    )
    return PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        cos=cos,
        sin=sin,
    )
