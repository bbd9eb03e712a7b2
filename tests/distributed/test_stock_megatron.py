"""Converted checkpoints are read by Megatron's own model and loader, without this package's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spear.conversion.convert import Layout, hf_to_megatron
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.tiny import tiny_hf_folder

TOKENS = torch.arange(10)[None]


def _stock_logits(folder: str, tensor: int, pipeline: int, tied: bool) -> Any:
    """Logits of Megatron's GPTModel with its local layers, loaded by ``dist_checkpointing``.

    This package gives only the meaning of CUDA names on a CPU.
    """
    import torch.distributed as dist

    from megatron_spear.policy import cpu

    cpu.install()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.mappings import (
        gather_from_tensor_model_parallel_region as gathered,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group("gloo")
    cpu.patch_megatron()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        kv_channels=32,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    with cpu.cuda_means_cpu():
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
            vocab_size=212,
            max_sequence_length=64,
            pre_process=first,
            post_process=last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
        )
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)
        model.load_state_dict(state["model"])
    mask = torch.triu(torch.ones(1, 1, 10, 10, dtype=torch.bool), 1)
    with torch.no_grad():
        if not first:
            received = torch.empty(10, 1, 64)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        out = model(TOKENS, TOKENS, mask)
        if not last:
            dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        return gathered(out).numpy()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "tied"), [(1, 1, True), (2, 1, False), (2, 2, True)]
)
def test_stock_megatron_reads_a_converted_checkpoint(
    tensor: int, pipeline: int, tied: bool, tmp_path: Path
) -> None:
    """Written for TP2 x PP2, read at each layout."""
    hf = tiny_hf_folder(tmp_path / "hf", vocab_size=212, tie_word_embeddings=tied)
    hf_to_megatron(tmp_path / "hf", tmp_path / "there", Layout(tensor=2, pipeline=2))
    results = run_ranks(
        _stock_logits, tensor * pipeline, str(tmp_path / "there"), tensor, pipeline, tied
    )
    (logits, *_) = [result for result in results if result is not None]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), hf(TOKENS).logits, rtol=0, atol=1e-5)
