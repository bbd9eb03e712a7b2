"""Schedules: every value once, messages within their limit, an order in which nothing waits for
ever; packed and unpacked they make what the engines' loaders make of whole tensors."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import ConfigError
from megatron_spear.testing.engine_shards import engine_parameters
from megatron_spear.testing.training_ranks import random_weights, rank_slices
from megatron_spear.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_spear.weight_sync.plan import plan_resharding
from megatron_spear.weight_sync.receivers.places import locate
from megatron_spear.weight_sync.sharded import receiver
from megatron_spear.weight_sync.sharded.records import Bucket, Piece, places, shape_as_rows
from megatron_spear.weight_sync.sharded.schedule import ReplicaSchedule, in_rounds, schedules
from megatron_spear.weight_sync.sharded.sender import Packer


def model(**changes: Any) -> ModelShape:
    values: dict[str, Any] = {
        "family": "qwen3",
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_size": 32,
        "num_heads": 8,
        "num_groups": 2,
        "head_dim": 4,
        "vocab_size": 259,
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
    EXPERTS,
]
WIDE: dict[str, Any] = {
    "hidden_size": 256, "ffn_size": 512, "num_heads": 4, "num_groups": 2, "head_dim": 128,
}  # fmt: skip
"""Every slice of two ranks begins and ends where FP8 blocks do."""


Ends = tuple[str, str]


def check_order(buckets: Iterable[Bucket]) -> None:
    """Ranks that send and receive without buffering, each in its own order, come to the end."""
    ends: list[Ends] = []
    queues: dict[str, list[int]] = defaultdict(list)
    for number, bucket in enumerate(buckets):
        ends.append((f"source {bucket.source}", f"target {bucket.target}"))
        for end in ends[-1]:
            queues[end].append(number)
    assert comes_to_the_end(ends, queues)


def comes_to_the_end(ends: list[Ends], queues: dict[str, list[int]]) -> bool:
    """Whether messages all pass, of which each needs both its ends to have come to it."""
    left = set(range(len(ends)))
    while left:
        possible = [n for n in left if all(queues[end][0] == n for end in ends[n])]
        if not possible:
            return False
        for number in possible:
            for end in ends[number]:
                queues[end].pop(0)
        left -= set(possible)
    return True


def check_coverage(schedule: ReplicaSchedule, bucket_bytes: int) -> None:
    """Each value of what is held arrives once, in messages within the limit."""
    counts = [[torch.zeros(shape_as_rows(t.shape)) for t in own] for own in schedule.tensors]
    for bucket in schedule.buckets:
        assert bucket.num_bytes <= bucket_bytes
        own = schedule.tensors[bucket.target]
        end = 0
        for piece, held, place in places(bucket.pieces, own):
            assert place.start >= end and place.start % 16 == 0
            end = place.stop
            rows, columns = (piece.row, piece.row_stop), (piece.column, piece.column_stop)
            counts[bucket.target][piece.tensor][slice(*rows), slice(*columns)] += 1
            assert place.stop - place.start == piece.num_values * held.torch_dtype.itemsize
        assert end <= bucket.num_bytes < end + 16
    for own, arrived in zip(schedule.tensors, counts, strict=True):
        for held, count in zip(own, arrived, strict=True):
            inside = count.narrow(held.axis, held.start, held.stop - held.start)
            assert (inside == 1).all() and count.sum() == inside.sum(), held.name


def check_values(
    shape: ModelShape,
    training: TrainingLayout,
    engine: EngineLayout,
    planned: tuple[ReplicaSchedule, ...],
    fp8: bool,
) -> None:
    weights = random_weights(shape)
    packers = [
        Packer({own.name: own for own in rank_slices(weights, shape, training, rank)})
        for rank in range(training.world_size)
    ]
    for schedule in planned:
        for rank in range(engine.tensor):
            cut = {"rank": rank, "size": engine.tensor, "expert_groups": engine.expert}
            expected = engine_parameters(weights, shape, fp8=fp8, **cut)
            own = {name: torch.zeros_like(value) for name, value in expected.items()}
            tensors = schedule.tensors[rank]
            targets = locate(tensors, own)
            for bucket in schedule.buckets:
                if bucket.target != rank:
                    continue
                lies = packers[bucket.source].as_it_lies(bucket, tensors)
                if lies is not None and not fp8:
                    packed = packers[bucket.source].pack(bucket, tensors, 0)
                    assert torch.equal(lies, packed[: len(lies)])
                flat = packers[bucket.source].pack(bucket, tensors, 1)
                memory = receiver.in_place(bucket, tensors, targets)
                if memory is not None:
                    memory.copy_(flat[: len(memory)])
                else:
                    receiver.unpack(flat, bucket, tensors, targets)
            for name, value in expected.items():
                assert torch.equal(own[name].view(torch.uint8), value.view(torch.uint8)), name


def check(
    shape: ModelShape,
    training: TrainingLayout,
    engine: EngineLayout,
    bucket_bytes: int,
    fp8: bool = False,
) -> tuple[ReplicaSchedule, ...]:
    planned = schedules(
        shape, training, engine, dtype=torch.bfloat16, fp8=fp8, bucket_bytes=bucket_bytes
    )
    assert len(planned) == engine.replicas
    needed = plan_resharding(shape, training, engine).needed.reshape(engine.replicas, -1).sum(1)
    for schedule, least in zip(planned, needed, strict=True):
        assert fp8 or schedule.needed_bytes == least
        check_coverage(schedule, bucket_bytes)
        check_order(schedule.buckets)
    check_values(shape, training, engine, planned, fp8)
    return planned


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2]),
    experts=st.sampled_from([1, 2, 4]),
    engine=st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (8, 2)]),
    replicas=st.integers(1, 3),
    bucket_bytes=st.integers(256, 20_000),
)
def test_any_layouts(
    family: dict[str, Any],
    tensor: int,
    pipeline: int,
    experts: int,
    engine: tuple[int, int],
    replicas: int,
    bucket_bytes: int,
) -> None:
    shape = model(**family | ({"vocab_size": 600} if engine[0] > 2 else {}))
    moe = bool(shape.num_experts)
    training = TrainingLayout(
        tensor=tensor, data=experts, pipeline=pipeline, expert=experts if moe else 1
    )
    layout = EngineLayout(tensor=engine[0], expert=engine[1] if moe else 1, replicas=replicas)
    check(shape, training, layout, bucket_bytes)


@pytest.mark.parametrize("family", [{}, EXPERTS | {"num_experts": 2}], ids=str)
@pytest.mark.parametrize("engine", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [140_000, 1 << 24])
def test_fp8_blocks_are_those_of_the_whole_tensors(
    family: dict[str, Any], engine: int, bucket_bytes: int
) -> None:
    shape = model(**family | WIDE)
    training = TrainingLayout(tensor=2)
    (schedule,) = check(shape, training, EngineLayout(tensor=engine), bucket_bytes, fp8=True)
    names = {held.name for held in schedule.tensors[0]}
    assert "model.layers.0.self_attn.o_proj.weight_scale_inv" in names
    assert "model.norm.weight_scale_inv" not in names


def test_fp8_blocks_that_slices_cut_are_refused() -> None:
    shape = model(**WIDE | {"ffn_size": 384})
    with pytest.raises(ConfigError) as error:
        schedules(
            shape, TrainingLayout(), EngineLayout(tensor=2),
            dtype=torch.bfloat16, fp8=True, bucket_bytes=1 << 24,
        )  # fmt: skip
    told = str(error.value)
    line = "model.layers.0.mlp.gate_proj.weight (384, 256): training rank 0 sends rows 0 to 192"
    assert line in told
    assert "down_proj" in told and "q_proj" not in told
    assert "less tensor parallelism" in told and "precision=model" in told


def test_buckets_too_small_for_a_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="bucket_bytes is 8, but 1 rows of model"):
        schedules(
            model(), TrainingLayout(), EngineLayout(),
            dtype=torch.bfloat16, fp8=False, bucket_bytes=8,
        )  # fmt: skip


def bucket(source: int, target: int, tensor: int = 0) -> Bucket:
    piece = Piece(tensor=tensor, row=0, row_stop=1, column=0, column_stop=1)
    return Bucket(source=source, target=target, pieces=(piece,), num_bytes=16)


def test_rounds_by_hand() -> None:
    """Two pairs side by side; the pair that shares a rank with both comes between."""
    queues = {
        (0, 0): [bucket(0, 0, n) for n in range(3)],
        (1, 1): [bucket(1, 1, n) for n in range(2)],
        (1, 0): [bucket(1, 0)],
    }
    found = [(b.source, b.target, b.pieces[0].tensor) for b in in_rounds(queues)]
    assert found == [(0, 0, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1), (0, 0, 2), (1, 0, 0)]


def test_orders_in_which_ranks_wait_for_each_other_are_found() -> None:
    ends = [("source 0", "target 0"), ("source 1", "target 1"),
            ("source 0", "target 1"), ("source 1", "target 0")]  # fmt: skip
    one_order = {"source 0": [0, 2], "source 1": [1, 3], "target 0": [0, 3], "target 1": [1, 2]}
    assert comes_to_the_end(ends, one_order)
    crossed = {"source 0": [0, 2], "source 1": [1, 3], "target 0": [3, 0], "target 1": [2, 1]}
    assert not comes_to_the_end(ends, crossed)


def test_two_ranks_compute_the_same() -> None:
    training, engine = TrainingLayout(tensor=2, data=2), EngineLayout(tensor=2, replicas=3)
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "fp8": False, "bucket_bytes": 5000}
    assert schedules(model(), training, engine, **kwargs) == schedules(
        model(), training, engine, **kwargs
    )
