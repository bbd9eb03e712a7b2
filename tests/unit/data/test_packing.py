"""Packing: hand numbers for the shift, properties for everything else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.data.packing import PackedStep, pack
from megatron_spear.errors import DataError
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Origin, TrainSample

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def sample_of(length: int, number: int) -> TrainSample:
    draw = np.random.default_rng(number)
    return make_sample(
        group=str(number),
        mask=[1] * length,
        token_ids=draw.integers(1, 99, length).astype(np.int32),
        old_logprobs=draw.normal(size=length).astype(np.float32),
        advantages=draw.normal(size=length).astype(np.float32),
    )


def packed_of(
    lengths: list[int],
    limit: int,
    data_parallel: int,
    multiple: int,
    mix: bool = False,
    each: int = 1,
) -> tuple[list[TrainSample], list[np.ndarray], PackedStep]:
    samples = [sample_of(length, number) for number, length in enumerate(lengths)]
    weights = [np.random.default_rng(n).random(length) for n, length in enumerate(lengths)]
    for weight in weights:
        weight[0] = 0.0
    origins = [Origin.REPLAY if n % 2 else Origin.ON_POLICY for n in range(len(lengths))]
    step = pack(
        samples,
        weights,
        origins,
        data_parallel=data_parallel,
        tokens_per_microbatch=limit,
        pad_multiple=multiple,
        sequence_multiple=each,
        mix_lengths=mix,
    )
    return samples, weights, step


def test_shift_by_hand() -> None:
    sample = make_sample(
        mask=(0, 1, 1),
        token_ids=np.array([5, 6, 7], np.int32),
        old_logprobs=np.array([0.0, -1.0, -2.0], np.float32),
        advantages=np.array([0.0, 3.0, 4.0], np.float32),
    )
    weight = np.array([0.0, 0.25, 0.75])
    step = pack([sample], [weight], [Origin.REPLAY], tokens_per_microbatch=8, pad_multiple=4)
    batch = step.micro_batches[0][0]
    assert batch.token_ids.tolist() == [5, 6, 7, 0]
    assert batch.labels.tolist() == [6, 7, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4] and batch.cu_seqlens.dtype == torch.int32
    assert batch.old_logprobs.tolist() == [-1.0, -2.0, 0.0, 0.0]
    assert batch.advantages.tolist() == [3.0, 4.0, 0.0, 0.0]
    assert batch.token_weight.tolist() == [0.25, 0.75, 0.0, 0.0]
    assert batch.origin.tolist() == [1, 1, 1, 0] and batch.origin.dtype == torch.uint8
    assert batch.max_seqlen == 3
    (values,) = step.unpack([[torch.tensor([10.0, 20.0, 99.0, 99.0])]])
    assert values.tolist() == [0.0, 10.0, 20.0] and values.dtype == np.float32


def test_sequences_are_padded_by_hand() -> None:
    samples = [
        make_sample(mask=[1] * len(ids), token_ids=np.array(ids, np.int32))
        for ids in ([5, 6, 7], [8])
    ]
    step = pack(
        samples,
        [np.array([0.0, 0.5, 0.5]), np.zeros(1)],
        [Origin.ON_POLICY] * 2,
        tokens_per_microbatch=8,
        sequence_multiple=4,
        pad_multiple=3,
    )
    batch = step.micro_batches[0][0]
    assert batch.token_ids.tolist() == [5, 6, 7, 0, 8, 0, 0, 0, 0, 0, 0, 0]
    assert batch.labels.tolist() == [6, 7, *[0] * 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 3] * 3
    assert batch.cu_seqlens.tolist() == [0, 4, 8, 12] and batch.max_seqlen == 4
    assert step.num_tokens == 4 and step.padding_fraction == pytest.approx(8 / 12)
    values = step.unpack([[torch.arange(10.0, 22.0)]])
    assert [v.tolist() for v in values] == [[0.0, 10.0, 11.0], [0.0]]


PACKINGS = (
    LENGTHS, st.integers(1, 64), st.integers(1, 4), st.integers(1, 4), st.booleans(),
    st.integers(1, 6),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(*PACKINGS)
def test_nothing_is_lost_or_doubled(
    lengths: list[int], limit: int, data_parallel: int, multiple: int, mix: bool, each: int
) -> None:
    samples, weights, step = packed_of(lengths, limit, data_parallel, multiple, mix, each)
    assert len(step.micro_batches) == data_parallel
    assert len({len(rank) for rank in step.micro_batches}) == 1
    packed_members = sorted(i for rank in step.members for group in rank for i in group)
    assert packed_members == list(range(len(lengths)))
    for rank, members in zip(step.micro_batches, step.members, strict=True):
        for batch, group in zip(rank, members, strict=True):
            used = sum(-(-lengths[i] // each) * each for i in group)
            assert used <= limit or len(group) == 1
            assert batch.num_tokens % multiple == 0 and not (batch.cu_seqlens % each).any()
            assert batch.cu_seqlens[-1] == batch.num_tokens
            starts = batch.cu_seqlens[: len(group)].tolist()
            for start, end, i in zip(starts, [*starts, used][1:], group, strict=True):
                used_here = start + lengths[i]
                assert np.array_equal(batch.token_ids[start:used_here], samples[i].token_ids)
                assert not batch.token_ids[used_here:end].any()
                assert not batch.token_weight[used_here:end].any()
            assert not batch.token_weight[used:].any()
    total = sum(float(b.token_weight.double().sum()) for r in step.micro_batches for b in r)
    assert total == pytest.approx(sum(w.sum() for w in weights), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(*PACKINGS)
def test_unpack_undoes_pack(
    lengths: list[int], limit: int, data_parallel: int, multiple: int, mix: bool, each: int
) -> None:
    samples, weights, step = packed_of(lengths, limit, data_parallel, multiple, mix, each)
    for name, originals in (
        ("old_logprobs", [s.old_logprobs for s in samples]),
        ("token_weight", [w.astype(np.float32) for w in weights]),
    ):
        back = step.unpack([[getattr(b, name) for b in rank] for rank in step.micro_batches])
        for value, original in zip(back, originals, strict=True):
            assert value[0] == 0
            assert np.array_equal(value[1:], original[1:])


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 64), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_micro_batches_come_in_multiples(
    lengths: list[int], limit: int, data_parallel: int, multiple: int, pad: int
) -> None:
    samples = [sample_of(length, number) for number, length in enumerate(lengths)]
    weights = [np.ones(length) * (np.arange(length) > 0) for length in lengths]
    step = pack(
        samples,
        weights,
        [Origin.ON_POLICY] * len(samples),
        data_parallel=data_parallel,
        tokens_per_microbatch=limit,
        pad_multiple=pad,
        microbatch_multiple=multiple,
    )
    (count,) = {len(rank) for rank in step.micro_batches}
    assert count % multiple == 0
    assert sorted(i for r in step.members for g in r for i in g) == list(range(len(lengths)))
    empty = [
        b
        for r, m in zip(step.micro_batches, step.members, strict=True)
        for b, g in zip(r, m, strict=True)
        if not g
    ]
    assert all(b.num_tokens == pad and not b.token_weight.any() for b in empty)
    assert not empty or len(lengths) < count * data_parallel


def test_ranks_get_about_the_same_cost() -> None:
    lengths = np.random.default_rng(0).integers(50, 300, 80).tolist()
    _, _, step = packed_of(lengths, 4096, 2, 1)
    tokens = [sum(b.num_tokens for b in rank) for rank in step.micro_batches]
    assert max(tokens) / min(tokens) < 1.1
    assert step.padding_fraction == 0


def test_long_sample_gets_a_micro_batch_of_its_own() -> None:
    _, _, step = packed_of([100, 3, 4, 5], 16, 1, 1)
    assert (0,) in step.members[0]


def test_refuses_what_cannot_be_trained() -> None:
    sample = sample_of(4, 0)
    with pytest.raises(DataError, match="token 0 has weight"):
        pack([sample], [np.ones(4)], [Origin.ON_POLICY], tokens_per_microbatch=8)
    with pytest.raises(DataError, match="3 weights for 4 tokens"):
        pack([sample], [np.zeros(3)], [Origin.ON_POLICY], tokens_per_microbatch=8)
    with pytest.raises(DataError, match="no samples"):
        pack([], [], [], tokens_per_microbatch=8)
