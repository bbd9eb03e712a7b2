"""Slices of Hugging Face tensors in a rank's parameters, against cutting whole tensors."""

from typing import Any

import pytest
import torch

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.mapping import WeightMap
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.slices import slices_of


def model(**changes: Any) -> ModelShape:
    values: dict[str, Any] = {
        "family": "qwen3",
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_size": 16,
        "num_heads": 8,
        "num_groups": 4,
        "head_dim": 2,
        "vocab_size": 13,
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
        "qk_norm": True,
    }
    return ModelShape(**values | changes)


FAMILIES: list[dict[str, Any]] = [
    {},
    {"family": "qwen2", "qkv_bias": True, "qk_norm": False, "num_groups": 8},
    {"family": "qwen3_moe", "num_experts": 4, "experts_per_token": 2},
]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_are_those_of_the_whole_tensor(family: dict[str, Any], size: int) -> None:
    for item in weight_table(model(**family)):
        wholes = [torch.randn(shape) for shape in item.shapes]
        covered = [torch.zeros(shape) for shape in item.shapes]
        for rank in range(size):
            part = (
                item.part(wholes, rank, size) if item.expert is None else item.to_megatron(wholes)
            )
            for found in slices_of(item, lambda part=part: part, part.dtype, rank, size):
                number = item.sources.index(found.name)
                length = found.stop - found.start
                expected = wholes[number].narrow(found.axis, found.start, length)
                blocks = found.blocks()
                assert torch.equal(torch.cat(blocks), expected), found.name
                assert all(_is_view(block, part) for block in blocks)
                covered[number].narrow(found.axis, found.start, length).add_(1)
        copies = 1 if item.split_axis is not None and item.expert is None else size
        assert all((count == copies).all() for count in covered)


def _is_view(block: torch.Tensor, part: torch.Tensor) -> bool:
    return block.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


def _embedding() -> WeightMap:
    return weight_table(model())[0]


def test_vocabulary_padding_is_cut_and_a_rank_of_padding_has_nothing() -> None:
    item = _embedding()  # 13 rows on 4 ranks: 4, 4, 4, 1
    whole = torch.randn(13, 8)
    held = [
        (found.start, found.stop)
        for rank in range(4)
        for found in slices_of(
            item, lambda rank=rank: item.part([whole], rank, 4), whole.dtype, rank, 4
        )
    ]
    assert held == [(0, 4), (4, 8), (8, 12), (12, 13)]
    assert not list(slices_of(item, lambda: whole[:1], whole.dtype, 13, 14)), "row 13 is padding"


def test_values_are_read_when_asked_for() -> None:
    part = torch.zeros(13, 8)
    (found,) = slices_of(_embedding(), lambda: part, part.dtype, 0, 1)
    part.fill_(3.0)
    assert (found.blocks()[0] == 3.0).all()
