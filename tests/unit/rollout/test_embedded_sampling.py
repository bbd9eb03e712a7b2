"""Draws of the embedded engine, and its slots."""

import numpy as np
import pytest
import torch
from embedded_cases import request

from megatron_spear.rollout.engines.jobs import prefill_chunks
from megatron_spear.rollout.engines.kv_cache import KVCache
from megatron_spear.rollout.engines.sampling import sample, seed_key, uniforms


def _draws(logits, temperature, count=20_000):
    keys = np.full(count, seed_key((5,)), np.uint64)
    draws = torch.from_numpy(uniforms(keys, np.arange(count, dtype=np.uint64)))
    rows = torch.tensor(logits).expand(count, -1)
    return sample(rows, torch.full((count,), temperature), draws)


def test_by_hand():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 4))
    draws = torch.tensor([0.1, 0.6, 0.699, 0.71], dtype=torch.float64)
    tokens, logprobs, finite = sample(logits, torch.ones(4), draws)
    assert tokens.tolist() == [0, 1, 1, 2]
    assert torch.allclose(logprobs.exp(), torch.tensor([0.2, 0.5, 0.5, 0.3]))
    assert finite.all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_and_logprobs_follow_the_tempered_distribution(temperature):
    logits = [0.0, 1.0, -1.0, 2.0]
    expected = torch.softmax(torch.tensor(logits) / temperature, -1)
    tokens, logprobs, _ = _draws(logits, temperature)
    seen = torch.bincount(tokens, minlength=4) / len(tokens)
    assert (seen - expected).abs().max() < 0.015  # four standard deviations of 20,000 draws
    assert torch.allclose(logprobs, expected.log()[tokens], atol=1e-6)


def test_greedy_takes_the_largest_with_its_raw_logprob():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs, _ = sample(logits, torch.zeros(1), torch.tensor([0.01], dtype=torch.float64))
    assert tokens.item() == 1
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1)[0, 1])


def test_top_p_by_hand():
    """Of 0.2, 0.5, 0.3 the two likeliest reach 0.6; the draw is from these, 5 to 3."""
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 4))
    draws = torch.tensor([0.01, 0.624, 0.626, 0.99], dtype=torch.float64)
    top_ps = torch.full((4,), 0.6, dtype=torch.float64)
    tokens, logprobs, _ = sample(logits, torch.ones(4), draws, top_ps)
    assert tokens.tolist() == [1, 1, 2, 2]
    assert torch.allclose(logprobs.exp(), torch.tensor([0.5, 0.5, 0.3, 0.3])), "of all tokens"


def test_a_nucleus_stops_at_the_token_that_reaches_it():
    logits = torch.log(torch.tensor([[0.25, 0.25, 0.5]]))
    for top_p, expected in ((1e-9, {2}), (0.49, {2}), (0.51, {0, 2}), (0.76, {0, 1, 2})):
        draws = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
        rows, top_ps = logits.expand(200, -1), torch.full((200,), top_p, dtype=torch.float64)
        assert {*sample(rows, torch.ones(200), draws, top_ps)[0].tolist()} == expected


def test_rows_of_top_p_1_and_greedy_ones_are_drawn_as_without_it():
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(3))
    draws = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    temperatures = torch.tensor([1.0, 0.7, 0.0]).repeat(100)
    top_ps = torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64).repeat(100)
    plain, narrow = (sample(logits, temperatures, draws, own) for own in (None, top_ps))
    assert all(torch.equal(one, other) for one, other in zip(plain, narrow, strict=True))


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]] * 3)
    draws = torch.tensor([2.0**-33, 0.5, 1 - 2.0**-33], dtype=torch.float64)
    assert sample(logits, torch.ones(3), draws)[0].tolist() in ([1, 1, 3], [1, 3, 3])


def test_non_finite_rows_are_marked():
    logits = torch.zeros(4, 3)
    logits[1, 2], logits[2, 0] = torch.nan, torch.inf
    _, _, finite = sample(logits, torch.ones(4), torch.full((4,), 0.5, dtype=torch.float64))
    assert finite.tolist() == [True, False, False, True]


def test_uniforms_depend_on_key_and_counter_only_and_fill_the_interval():
    keys = np.array([seed_key((i,)) for i in range(200)], np.uint64)
    table = np.stack([uniforms(keys, np.full(200, c, np.uint64)) for c in range(100)])
    assert uniforms(keys[7:8], np.array([42], np.uint64))[0] == table[42, 7]
    assert table.min() > 0 and table.max() < 1
    histogram = np.histogram(table, 10, (0, 1))[0] / table.size
    assert np.abs(histogram - 0.1).max() < 0.01
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 0.4
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.03


def test_seed_tuples_do_not_run_together():
    seeds = [(1, 23), (12, 3), (123,), (1, 2, 3), (-1, 23), (2**80,)]
    assert len({seed_key(seed) for seed in seeds}) == len(seeds)


def _cache(slots=3):
    return KVCache(
        layers=1, slots=slots, kv_heads=1, max_context=8, head_dim=2, dtype=torch.float32
    )


def test_slots_are_kept_then_taken_from_the_one_idle_longest():
    cache = _cache()
    assert [cache.acquire(s, ()) for s in "abc"] == [0, 1, 2]
    assert cache.acquire("a", ()) == 0
    assert cache.acquire("d", {0}) == 1, "b is idle longest"
    assert cache.slot_of("b") is None and cache.slot_of("c") == 2
    assert cache.acquire("e", {0, 1, 2}) is None
    cache.release("c")
    cache.release("nobody")
    assert cache.acquire("e", ()) == 2, "the free one comes first"
    assert [cache.slot_of(s) for s in "ade"] == [0, 1, 2]


def test_common_prefix_counts_valid_tokens_only():
    cache = _cache()
    cache.append(0, np.array([1, 2, 3], np.int32))
    cache.append(1, np.array([1, 2], np.int32))
    cache.append(2, np.array([9], np.int32))
    assert cache.common_prefix(np.array([1, 2, 3, 4], np.int32)).tolist() == [3, 2, 0]
    cache.truncate(0, 1)
    assert cache.common_prefix(np.array([1, 2, 3, 4], np.int32)).tolist() == [1, 2, 0]


def test_copy_takes_tokens_and_keys():
    cache = _cache()
    cache.append(0, np.array([1, 2, 3], np.int32))
    cache.storage[:, :, 0] = 5.0
    cache.copy(0, [1, 2], 0, 2)
    assert cache.length.tolist() == [3, 2, 2]
    assert (cache.storage[:, :, 2, :, :2] == 5).all() and (cache.storage[:, :, 2, :, 2:] == 0).all()


def test_prefill_chunks_keep_all_and_bound_the_padded_size():
    class Waiting:
        def __init__(self, size, cached):
            self.prompt, self.cached = request(range(size)).token_ids, cached

    groups = [[Waiting(2000 + 10 * i, 0)] for i in range(5)] + [[Waiting(500, 490)]]
    chunks = prefill_chunks(groups)
    assert sorted(id(g) for chunk in chunks for g in chunk) == sorted(map(id, groups))
    for chunk in chunks[1:]:
        new = max(len(g[0].prompt) - g[0].cached for g in chunk)
        longest = max(len(g[0].prompt) for g in chunk)
        assert len(chunk) == 1 or len(chunk) * new * longest <= 4 << 20
