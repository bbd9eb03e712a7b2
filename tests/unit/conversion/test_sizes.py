"""Counts of parameters without tensors, against the weight tables and published sizes."""

import dataclasses
from math import prod

import pytest

from megatron_spear.config.presets.models import MODELS
from megatron_spear.conversion.plain_config import shape_of_values
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import (
    active_parameters,
    layer_parameters,
    model_parameters,
    padded_vocab,
    stage_parameters,
)
from megatron_spear.policy.parallel import Place
from megatron_spear.policy.weights import local_shapes

LLAMA = ModelShape(
    family="llama", num_layers=4, hidden_size=8, ffn_size=16, num_heads=4, num_groups=2,
    head_dim=2, vocab_size=51, norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip
SHAPES = {
    "llama": LLAMA,
    "mistral": dataclasses.replace(LLAMA, family="mistral"),
    "qwen2, tied": dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tied=True),
    "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_norm=True),
    "qwen3_moe": dataclasses.replace(
        LLAMA, family="qwen3_moe", qk_norm=True, num_experts=8, experts_per_token=2
    ),
}


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_weight_tables(name: str, tensor: int, pipeline: int) -> None:
    shape = SHAPES[name]
    expert = 4 if shape.num_experts else 1
    for stage in range(pipeline):
        place = Place(
            tensor_rank=0,
            tensor_size=tensor,
            pipeline_rank=stage,
            pipeline_size=pipeline,
            expert_size=expert,
        )
        named = local_shapes(shape, place)
        own = stage_parameters(shape, stage, tensor=tensor, pipeline=pipeline, expert=expert)
        assert own.total == sum(map(prod, named.values()))
        assert own.experts == sum(prod(s) for n, s in named.items() if ".experts." in n)
        linears = [s for n, s in named.items() if ".linear_" in n and len(s) == 2]
        assert own.linears + own.experts == sum(map(prod, linears))


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes(name: str) -> None:
    model = MODELS[name]
    assert model_parameters(shape_of_values(model.config, name)).total == model.num_parameters


def test_a_token_goes_through_the_chosen_experts_alone() -> None:
    """Qwen3-30B-A3B: 8 of 128 experts, 3.3 B (its model card)."""
    shape = shape_of_values(MODELS["qwen3-30b-a3b"].config, "it")
    assert active_parameters(shape) == pytest.approx(3.3e9, rel=0.03)


def test_the_example_of_a_layer() -> None:
    layer = layer_parameters(LLAMA)
    assert (layer.linears, layer.rest, layer.experts) == (576, 16, 0)
    assert padded_vocab(51, 2) == 52
