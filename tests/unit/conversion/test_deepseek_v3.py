"""DeepSeek-V3's table has transformers' tensors, all of them once, and splits as heads allow."""

from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from megatron_spear.conversion.families.deepseek_v3 import table

SMALL = {
    "vocab_size": 63,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}


SPLIT = ("embeddings", "output_layer", "up_proj", "linear_proj", "linear_fc1", "linear_fc2")


def test_names_and_shapes_are_those_of_transformers(tmp_path: Path) -> None:
    DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    found: dict[str, tuple[int, ...]] = {}
    for item in table(DeepseekV3Config(**SMALL)):
        for name, shape in zip(item.sources, item.shapes, strict=True):
            assert name not in found
            found[name] = tuple(shape)
    assert found == saved


def test_published_size() -> None:
    assert sum(prod(item.full_shape) for item in table(DeepseekV3Config())) == 671_026_419_200


def test_ranks_hold_everything_once() -> None:
    for item in table(DeepseekV3Config(**SMALL)):
        sources = [torch.randn(shape) for shape in item.shapes]
        whole = item.unshard([item.part(sources, rank, 2) for rank in range(2)])
        assert torch.equal(whole, item.to_megatron(sources)), item.target
        name = item.target.removesuffix(".weight").rpartition(".")[2]
        split = item.part(sources, 0, 2).shape != item.full_shape
        if item.expert is None:
            assert split == name.endswith(SPLIT), item.target
