"""Whose token is whose under context parallelism, against a reference that walks over tokens."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_spear.data.packing import TrainBatch, pack
from megatron_spear.data.zigzag import joined, part_of, zigzag_order
from megatron_spear.errors import DataError
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import Origin

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def batch_of(lengths: list[int], sequence_multiple: int) -> TrainBatch:
    """One micro-batch whose tokens are all different."""
    ids = np.split(np.arange(1, sum(lengths) + 1, dtype=np.int32), np.cumsum(lengths)[:-1])
    samples = [make_sample(mask=[1] * len(own), token_ids=own) for own in ids]
    weights = [np.arange(len(own)) / 8 for own in ids]
    step = pack(
        samples,
        weights,
        [Origin.REPLAY] * len(samples),
        tokens_per_microbatch=10_000,
        sequence_multiple=sequence_multiple,
    )
    return step.micro_batches[0][0]


def owners(cu_seqlens: list[int], ranks: int) -> list[list[int]]:
    """The tokens of each rank."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    for start, end in pairwise(cu_seqlens):
        size = (end - start) // (2 * ranks)
        for token in range(start, end):
            chunk = (token - start) // size
            found[chunk if chunk < ranks else 2 * ranks - 1 - chunk].append(token)
    return found


def test_by_hand() -> None:
    cu_seqlens = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert zigzag_order(cu_seqlens, 2).tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4))
def test_each_rank_has_its_chunks_and_all_come_back(lengths: list[int], ranks: int) -> None:
    batch = batch_of(lengths, 2 * ranks)
    parts = [part_of(batch, rank, ranks) for rank in range(ranks)]
    for part, tokens in zip(parts, owners(batch.cu_seqlens.tolist(), ranks), strict=True):
        assert part.num_tokens * ranks == batch.num_tokens
        for name in ("token_ids", "labels", "position_ids", "token_weight", "origin"):
            assert getattr(part, name).tolist() == getattr(batch, name)[tokens].tolist()
        assert torch.equal(part.cu_seqlens, batch.cu_seqlens)
        assert part.max_seqlen == batch.max_seqlen
    assert torch.equal(joined([part.labels for part in parts], batch.cu_seqlens), batch.labels)


def test_what_one_rank_has_is_all_of_it() -> None:
    batch = batch_of([3, 1], 1)
    assert part_of(batch, 0, 1) is batch
    assert joined([batch.labels], batch.cu_seqlens) is batch.labels


def test_refuses_sequences_that_cannot_be_cut() -> None:
    with pytest.raises(DataError, match=r"\[8, 2\] tokens .* multiples of 4; pass sequence_multi"):
        part_of(batch_of([8, 2], 2), 0, 2)
