"""The resharding plan, executed on small models, against gathering everything and slicing it."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.sizes import padded_vocab
from megatron_spear.errors import ConfigError
from megatron_spear.weight_sync.layouts import (
    EngineLayout,
    TrainingLayout,
    engine_vocab_rows,
)
from megatron_spear.weight_sync.plan import Plan, plan_resharding


def model(**changes: Any) -> ModelShape:
    values: dict[str, Any] = {
        "family": "qwen3",
        "num_layers": 4,
        "hidden_size": 8,
        "ffn_size": 16,
        "num_heads": 8,
        "num_groups": 2,
        "head_dim": 2,
        "vocab_size": 133,
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
        "qk_norm": True,
    }
    return ModelShape(**values | changes)


EXPERTS = {"family": "qwen3_moe", "num_experts": 4, "experts_per_token": 2}
FAMILIES: list[dict[str, Any]] = [
    {},
    {"tied": True},
    {"family": "qwen2", "qkv_bias": True, "qk_norm": False, "num_groups": 8},
    {"family": "llama", "qk_norm": False, "num_groups": 4, "vocab_size": 200},
    EXPERTS,
]


def rank_has(
    weights: dict[str, torch.Tensor], shape: ModelShape, layout: TrainingLayout, rank: int
) -> dict[str, tuple[int, int, torch.Tensor]]:
    """By name, along which axis a training rank's slice is cut, where it begins, and the slice:
    what the rank makes of its Megatron parameters."""
    within, stage = rank % layout.stage_size, rank // layout.stage_size
    found = {}
    for item in weight_table(shape):
        if item.tied:
            continue
        sources = [weights[name] for name in item.sources]
        piece = item.layer // (shape.num_layers // (layout.pipeline * layout.virtual))
        where = {"first": 0, "last": layout.pipeline - 1}.get(item.stage, piece % layout.pipeline)
        if where != stage:
            continue
        if item.expert is not None:
            if item.expert // (shape.num_experts // layout.expert) != within % layout.expert:
                continue
            part, place = item.part(sources, 0, 1), 0
        else:
            part, place = item.part(sources, within % layout.tensor, layout.tensor), within
        for name, values in zip(item.sources, item.to_hf(part), strict=True):
            axis = 0 if item.split_axis is None or item.expert is not None else item.split_axis
            split = item.split_axis is not None and item.expert is None
            begin = place % layout.tensor * values.shape[axis] if split else 0
            found[name] = (axis, begin, values)
    return found


def engine_needs(
    name: str, weight: torch.Tensor, shape: ModelShape, layout: EngineLayout, rank: int
) -> torch.Tensor | None:
    """What SGLang's and vLLM's loaders keep of a tensor on one tensor-parallel rank."""
    parts = layout.tensor
    if "experts" in name:
        inner = parts // layout.expert
        expert = int(name.split("experts.")[1].split(".")[0])
        if expert // (shape.num_experts // layout.expert) != rank // inner:
            return None
        return weight.chunk(inner, 1 if "down_proj" in name else 0)[rank % inner]
    if "embed_tokens" in name or "lm_head" in name:
        padded = padded_vocab(len(weight), 64)
        rows = (padded if padded % parts == 0 else padded_vocab(len(weight), 64 * parts)) // parts
        part = weight[rank * rows : (rank + 1) * rows]
        return part if len(part) else None
    if "norm" in name or ".gate." in name:
        return weight
    if "k_proj" in name or "v_proj" in name:
        heads = weight.unflatten(0, (shape.num_groups, shape.head_dim))
        first = rank * shape.num_groups // parts
        return heads[first : first + max(1, shape.num_groups // parts)].flatten(0, 1)
    return weight.chunk(parts, 1 if "o_proj" in name or "down_proj" in name else 0)[rank]


def execute(
    plan: Plan, weights: dict[str, torch.Tensor], shape: ModelShape, layout: TrainingLayout
) -> list[dict[str, torch.Tensor]]:
    """What each engine rank has afterwards: NaN where nothing arrived; twice is an error."""
    ranks = [rank_has(weights, shape, layout, rank) for rank in range(layout.world_size)]
    results: list[dict[str, torch.Tensor]] = [{} for _ in plan.needed]
    for transfer in plan.transfers():
        held_axis, begin, values = ranks[transfer.source][transfer.name]
        begin = begin if held_axis == transfer.axis else 0
        sent = values.narrow(transfer.axis, transfer.start - begin, transfer.stop - transfer.start)
        assert sent.numel() * 2 == transfer.num_bytes
        own = results[transfer.target]
        if transfer.name not in own:
            own[transfer.name] = torch.full(weights[transfer.name].shape, torch.nan)
        place = own[transfer.name].narrow(
            transfer.axis, transfer.start, transfer.stop - transfer.start
        )
        assert place.isnan().all(), "sent twice"
        place.copy_(sent)
    return results


def check(shape: ModelShape, training: TrainingLayout, engine: EngineLayout) -> Plan:
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(size, generator=draw)
        for item in weight_table(shape)
        if not item.tied
        for name, size in zip(item.sources, item.shapes, strict=True)
    }
    plan = plan_resharding(shape, training, engine)
    assert plan.excess == 1.0 and (plan.received == plan.needed).all()
    for target, found in enumerate(execute(plan, weights, shape, training)):
        for name, weight in weights.items():
            expected = engine_needs(name, weight, shape, engine, target % engine.tensor)
            if expected is None:
                assert name not in found
                continue
            got = found[name][~found[name].isnan()]
            assert torch.equal(got, expected.flatten()), name
    return plan


TRAINING = [
    TrainingLayout(),
    TrainingLayout(tensor=2, pipeline=2),
    TrainingLayout(tensor=2, data=2, pipeline=2, virtual=2),
    TrainingLayout(data=3),
    TrainingLayout(tensor=2, context=2, data=2),
]
ENGINES = [EngineLayout(), EngineLayout(tensor=2, replicas=2), EngineLayout(tensor=8)]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("training", TRAINING, ids=str)
def test_executed_plan_equals_gather_then_slice(
    family: dict[str, Any], training: TrainingLayout
) -> None:
    for engine in ENGINES:
        check(model(**family), training, engine)


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tensor=st.sampled_from([1, 2]),
    rest=st.tuples(*[st.integers(1, 3)] * 2),
    pipeline=st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2)]),
    experts=st.sampled_from([1, 2, 4]),
    engine=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (8, 2), (8, 4)]),
    replicas=st.integers(1, 5),
    vocab=st.integers(1, 400),
)
def test_any_layouts(
    family: dict[str, Any],
    tensor: int,
    rest: tuple[int, int],
    pipeline: tuple[int, int],
    experts: int,
    engine: tuple[int, int],
    replicas: int,
    vocab: int,
) -> None:
    shape = model(**family | {"vocab_size": vocab})
    layout = TrainingLayout(
        tensor=tensor,
        context=rest[0],
        data=rest[1] * experts,
        pipeline=pipeline[0],
        virtual=pipeline[1],
        expert=experts if shape.num_experts else 1,
    )
    groups = engine[1] if shape.num_experts else 1
    check(shape, layout, EngineLayout(tensor=engine[0], expert=groups, replicas=replicas))


def test_by_hand() -> None:
    """Tensor parallel 2 to 4: each rank sends to two."""
    plan = plan_resharding(model(), TrainingLayout(tensor=2), EngineLayout(tensor=4))
    name = "model.layers.0.mlp.down_proj.weight"  # 8 x 16, split along its columns
    found = [
        (t.source, t.target, t.axis, t.start, t.stop) for t in plan.transfers() if t.name == name
    ]
    assert found == [(0, 0, 1, 0, 4), (0, 1, 1, 4, 8), (1, 2, 1, 8, 12), (1, 3, 1, 12, 16)]
    assert {t.num_bytes for t in plan.transfers() if t.name == name} == {4 * 8 * 2}
    assert len(plan.transfers(source=0)) + len(plan.transfers(source=1)) == len(plan)


def test_rows_of_an_engines_embedding() -> None:
    """SGLang's ``VocabParallelEmbedding`` pads to 64, to 64 x ranks if those do not divide it."""
    assert engine_vocab_rows(133, 2) == 96  # 192 in all, not 256
    assert engine_vocab_rows(133, 3) == 64
    assert engine_vocab_rows(133, 5) == 64  # 320
    assert engine_vocab_rows(151_936, 4) == 151_936 // 4


def test_copies_share_the_work() -> None:
    plan = plan_resharding(
        model(num_layers=8),
        TrainingLayout(tensor=2, data=4),
        EngineLayout(tensor=2, replicas=8),
    )
    assert plan.sent.max() <= 1.05 * plan.sent.mean()
    again = plan_resharding(
        model(num_layers=8), TrainingLayout(tensor=2, data=4), EngineLayout(tensor=2, replicas=8)
    )
    assert (plan.source == again.source).all() and (plan.target == again.target).all()


def test_layouts_that_do_not_divide_are_all_told() -> None:
    with pytest.raises(ConfigError) as error:
        plan_resharding(
            model(), TrainingLayout(tensor=3, pipeline=3), EngineLayout(tensor=16, replicas=1)
        )
    told = str(error.value)
    for line in (
        "num_groups=2 is not a multiple of training tensor parallel=3",
        "num_layers=4 is not a multiple of training pipeline x virtual=3",
        "num_heads=8 is not a multiple of engine tensor parallel=16",
    ):
        assert line in told
    with pytest.raises(ConfigError, match="neither divides"):
        plan_resharding(
            model(num_heads=12, num_groups=4, ffn_size=12), TrainingLayout(), EngineLayout(tensor=6)
        )


def test_sums_are_those_of_the_transfers() -> None:
    plan = plan_resharding(
        model(**EXPERTS), TrainingLayout(data=2, expert=2), EngineLayout(tensor=2)
    )
    every = plan.transfers()
    for rank, sent in enumerate(plan.sent):
        assert sent == sum(t.num_bytes for t in every if t.source == rank)
    assert np.array_equal(plan.received, plan.needed)


def test_a_32b_model_on_128_and_64_ranks() -> None:
    shape = model(
        num_layers=64,
        hidden_size=5120,
        ffn_size=25600,
        num_heads=64,
        num_groups=8,
        head_dim=128,
        vocab_size=151_936,
    )
    training = TrainingLayout(tensor=8, pipeline=4, data=4)
    plan = plan_resharding(shape, training, EngineLayout(tensor=4, replicas=16))
    assert plan.excess == 1.0 and (plan.received == plan.needed).all()
    assert plan.sent.max() <= 1.05 * plan.sent.mean()
    assert plan.num_bytes.sum() == pytest.approx(16 * 2 * 32_762_123_264, rel=0.001)
