"""Buckets: every byte once, in order, aligned, in memory not written to while it is sent."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from megatron_spear.weight_sync.buckets import Bucket, pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def _memory(num_bytes: int) -> torch.Tensor:
    return torch.full((num_bytes,), 255, dtype=torch.uint8)


def _named(sizes: list[tuple[int, torch.dtype]]) -> list[tuple[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (str(i), torch.randn(size, generator=draw).to(dtype))
        for i, (size, dtype) in enumerate(sizes)
    ]


def _names(buckets: list[Bucket]) -> list[list[str]]:
    return [[spec.name for spec in bucket.tensors] for bucket in buckets]


def test_a_tensor_that_would_not_be_aligned_begins_a_bucket() -> None:
    tensors = _named([(3, torch.bfloat16), (1, torch.float32), (1, torch.bfloat16)])
    assert _names(list(pack(tensors, 8, _memory))) == [["0"], ["1", "2"]]
    assert _names(list(pack(tensors[::-1], 64, _memory))) == [["2"], ["1", "0"]]


def test_a_tensor_larger_than_a_bucket_is_alone() -> None:
    tensors = _named([(1, torch.float32), (9, torch.float32), (2, torch.float32)])
    buckets = list(pack(tensors, 32, _memory))
    assert _names(buckets) == [["0"], ["1"], ["2"]]
    assert [bucket.num_bytes for bucket in buckets] == [4, 36, 8]


def test_nothing_makes_no_bucket() -> None:
    assert list(pack([], 32, _memory)) == []


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from(DTYPES)), max_size=30),
    st.integers(4, 100),
)
def test_all_arrive_bit_by_bit_while_the_next_is_made(sizes, bucket_bytes: int) -> None:
    tensors = _named(sizes)
    made = 0

    def allocate(num_bytes: int) -> torch.Tensor:
        nonlocal made
        made += num_bytes <= bucket_bytes
        return _memory(num_bytes)

    found: list[tuple[str, torch.Tensor]] = []
    before: Bucket | None = None
    for bucket in pack(tensors, bucket_bytes, allocate):
        assert bucket.num_bytes == sum(spec.num_bytes for spec in bucket.tensors)
        assert len(bucket.tensors) == 1 or bucket.num_bytes <= bucket_bytes
        if before is not None:  # as a sender: read while the next one has been made
            found += [(name, tensor.clone()) for name, tensor in unpack(before)]
        before = bucket
    if before is not None:
        found += list(unpack(before))
    assert [name for name, _ in found] == [name for name, _ in tensors]
    for (_, got), (_, sent) in zip(found, tensors, strict=True):
        assert got.dtype is sent.dtype and torch.equal(
            got.view(torch.uint8), sent.view(torch.uint8)
        )
    assert made <= 2
