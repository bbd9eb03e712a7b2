"""A Megatron-Core GPTModel for a Hugging Face model, for packed sequences."""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_spear.config.schema import PolicySection
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import padded_vocab
from megatron_spear.data.packing import TrainBatch
from megatron_spear.policy import fp8
from megatron_spear.policy.attention import (
    PackedAttention,
    PackedLayout,
    Rotary,
    packed_layout,
    stays_packed,
)
from megatron_spear.policy.context_attention import ContextAttention, context_layout
from megatron_spear.policy.experts import experts_config, experts_spec
from megatron_spear.policy.layers import GatedMlp, RMSNorm
from megatron_spear.policy.parallel import ParallelContext
from megatron_spear.policy.weights import stored_prefixes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
"""Megatron's settings by ``policy.recompute``."""


def transformer_config(shape: ModelShape, policy: PolicySection) -> TransformerConfig:
    """Megatron's config: no dropout, no fused kernels that need apex, losses as plain sums."""
    dtype = DTYPES[policy.precision]
    te = policy.transformer_impl == "transformer_engine"
    interleaved = policy.virtual_pipeline if policy.virtual_pipeline > 1 else None
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=policy.tensor_parallel,
        context_parallel_size=policy.context_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=interleaved,
        # interleaved, of two ranks each is next and previous of the other: one direction at a time
        overlap_p2p_comm=interleaved is not None,
        batch_p2p_comm=interleaved is None,
        sequence_parallel=policy.sequence_parallel,
        variable_seq_lengths=policy.pipeline_parallel > 1,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it without experts
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not te,
        perform_initialization=False,  # weights come from the Hugging Face folder
        calculate_per_token_loss=True,  # neither micro-batches nor ranks divide the loss
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **(experts_config(shape, policy.expert_parallel) if shape.num_experts else {}),
        moe_grouped_gemm=te and shape.num_experts > 0,
        **RECOMPUTE[policy.recompute],
        **fp8.config_fields(policy.fp8),
    )


def block_spec(
    shape: ModelShape, policy: PolicySection, num_layers: int
) -> TransformerBlockSubmodules:
    """``num_layers`` layers and the final norm, of TransformerEngine where it has been chosen."""
    if policy.transformer_impl == "transformer_engine":
        from megatron_spear.policy import transformer_engine

        return transformer_engine.block_spec(shape, policy, num_layers)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(shape, policy)] * num_layers, layer_norm=RMSNorm
    )


def layer_spec(shape: ModelShape, policy: PolicySection) -> ModuleSpec:
    """Megatron's transformer layer with this package's attention kernel, norm and gate."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ContextAttention if policy.context_parallel > 1 else PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if shape.qk_norm else IdentityOp,
            k_layernorm=RMSNorm if shape.qk_norm else IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=experts_spec() if shape.num_experts else mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=stored_prefixes(shape),
        ),
    )


class PackedModel(GPTModel):  # type: ignore[misc]
    """GPTModel that takes this rank's part of a ``TrainBatch`` and gives its logits ``[T, V / tp]``
    on the last stage.

    Positions are applied in the attention (see ``attention``), so Megatron's own are switched off.
    With ``policy.virtual_pipeline`` c > 1 the layers are cut into c pieces for each of the p
    pipeline ranks: rank r's ``chunk`` k is piece k p + r, and only the last of all gives logits.
    """

    def __init__(
        self, shape: ModelShape, policy: PolicySection, ctx: ParallelContext, chunk: int = 0
    ) -> None:
        config = transformer_config(shape, policy)
        chunks = policy.virtual_pipeline
        layers = shape.num_layers // (ctx.pipeline_size * chunks)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(shape, policy, layers),
            vocab_size=padded_vocab(shape.vocab_size, ctx.tensor_size),
            max_sequence_length=shape.max_length,
            pre_process=ctx.pipeline_rank == 0 and chunk == 0,
            post_process=ctx.is_last_stage and chunk == chunks - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="none",
            vp_stage=chunk if chunks > 1 else None,
        )
        if not shape.num_experts:
            for layer in self.decoder.layers:
                GatedMlp.adopt(layer.mlp)
        _mark_split_weights(self)
        self.first_layer = layers * (chunk * ctx.pipeline_size + ctx.pipeline_rank)
        self.first_expert = shape.num_experts // ctx.expert_size * ctx.expert_rank
        self.ctx = ctx
        self.rotary = Rotary(shape, ctx.device, config.params_dtype)
        self.has_te_layers = policy.transformer_impl == "transformer_engine"
        self.packed_attention = stays_packed(ctx.device, config.params_dtype) or (
            self.has_te_layers and ctx.context_size == 1
        )

    def forward(self, batch: TrainBatch) -> Tensor:
        """Logits ``[T, V / tp]`` on the last stage, hidden states ``[T, 1, hidden]`` before it."""
        output = super().forward(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            packed_seq_params=self._layout(batch),
        )
        return output[0] if self.post_process else output

    def _layout(self, batch: TrainBatch) -> PackedLayout:
        packed, ctx = self.packed_attention, self.ctx
        if ctx.context_size > 1:
            place = (ctx.context_rank, ctx.context_size, ctx.context)
            return context_layout(batch, self.rotary, *place, packed=packed)
        if self.has_te_layers:
            from megatron_spear.policy import transformer_engine

            return transformer_engine.layout_of(batch, self.rotary)
        return packed_layout(batch.cu_seqlens, batch.max_seqlen, self.rotary, packed=packed)


def _mark_split_weights(model: torch.nn.Module) -> None:
    """Tell Megatron which weights are split over ranks, and how (the gradient norm needs it).

    Megatron does so while it initialises weights, which is switched off here; TransformerEngine's
    linears do it themselves. An expert's weights are whole, but marked too: each tensor-parallel
    rank counts its own experts.
    """
    axes = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        axis = axes.get(type(module))
        weight = getattr(module, "weight", None)
        if axis is not None and weight is not None and not hasattr(weight, "partition_dim"):
            set_tensor_model_parallel_attributes(weight, True, axis, getattr(module, "stride", 1))
