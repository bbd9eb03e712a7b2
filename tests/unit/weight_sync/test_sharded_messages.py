"""What engine ranks are told of an update: read as it was meant, and encoded once a schedule."""

import torch

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_spear.weight_sync.sharded.lane import Lane
from megatron_spear.weight_sync.sharded.records import (
    Assignment,
    Meeting,
    decode_part,
    encode_part,
)
from megatron_spear.weight_sync.sharded.schedule import ReplicaSchedule, schedules

SHAPE = ModelShape(
    family="qwen3_moe", num_layers=1, hidden_size=16, ffn_size=32, num_heads=2, num_groups=2,
    head_dim=8, vocab_size=64, norm_eps=1e-6, rope_theta=1e4, qk_norm=True, num_experts=4,
    experts_per_token=2,
)  # fmt: skip
MEETING = Meeting(
    host="10.0.0.1", port=1, name="n", backend="gloo", senders=(0, 1), num_receivers=2,
    timeout_s=8.0,
)  # fmt: skip


def planned(replicas: int) -> tuple[ReplicaSchedule, ...]:
    return schedules(
        SHAPE,
        TrainingLayout(tensor=2),
        EngineLayout(tensor=2, replicas=replicas),
        dtype=torch.bfloat16,
        fp8=False,
        bucket_bytes=2000,
    )


def test_a_message_is_read_as_it_was_meant() -> None:
    (schedule,) = planned(1)
    for rank in (0, 1):
        sent = Assignment(
            meeting=MEETING,
            update=3,
            rank=rank,
            limit_s=1.5,
            part=encode_part(*schedule.part(rank)),
        )
        got = Assignment.decode(sent.encode())
        tensors, buckets = decode_part(got.part)
        assert got == sent and tensors == schedule.tensors[rank]
        assert buckets == tuple(b for b in schedule.buckets if b.target == rank) and buckets


def test_the_part_that_stays_is_encoded_once_a_schedule() -> None:
    lane = Lane(MEETING, 0, None, torch.device("cpu"))
    (alone,), (first, _) = planned(1), planned(2)
    parts = lane._parts_of(alone)
    assert lane._parts_of(alone) is parts
    assert lane._parts_of(first) == [encode_part(*first.part(rank)) for rank in (0, 1)]
    assert decode_part(parts[1]) is decode_part(bytes(parts[1])), "read once as well"
