"""Covariance clipping and KL-Cov's selection: by hand, the quota, draws that no split changes."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from megatron_spear.algorithms import masked_blocks as blocks_module
from megatron_spear.algorithms.covariance import (
    covariances,
    drop_quota,
    dropped_fraction,
    dropped_tokens,
    in_band,
    kl_selected_tokens,
    masked_means,
    ratio_clipped,
)
from megatron_spear.algorithms.draws import stream_draws, stream_key
from megatron_spear.algorithms.masked_blocks import masked_blocks
from megatron_spear.config.losses import ClipCovLossSection
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import BoolArray, TrainSample

BOUNDS = {"clip_low": 0.2, "clip_high": 0.28}


def _random_update(seed: int, count: int = 12) -> tuple[list[TrainSample], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    samples, logprobs = [], []
    for i in range(count):
        mask = rng.random(20) < 0.6
        sample = make_sample(f"g{i % 3}", i, mask=mask, advantage=float(rng.normal()))
        current = np.where(mask, rng.normal(-1, 1, 20), 0).astype(np.float32)
        samples.append(replace(sample, old_logprobs=current + np.float32(0.01)))
        logprobs.append(current)
    return samples, logprobs


def _drop(
    samples: list[TrainSample], logprobs: list[np.ndarray], fraction: float = 0.1, **key: int
) -> list[BoolArray]:
    section = ClipCovLossSection(fraction=fraction, low=0.1, high=60.0)
    return dropped_tokens(samples, logprobs, section, **BOUNDS, **({"seed": 0, "step": 1} | key))


def test_covariances_by_hand() -> None:
    sample = replace(make_sample(mask=[1, 1, 0]), advantages=np.array([2, 0, 9], np.float32))
    (block,) = masked_blocks([sample], [np.array([-1.0, -3.0, 99.0])])
    means = masked_means([block])
    assert means == (-2.0, 1.0)
    assert covariances(block.logprobs, block.advantages, means).tolist() == [1.0, 1.0]


def test_ratio_clipped_by_hand() -> None:
    old = np.zeros(5)
    new = np.log([1.5, 1.2, 0.5, 1.5, 1e-30])
    clipped = ratio_clipped(new, old, np.array([1.0, 1.0, 1.0, -1.0, -1.0]), **BOUNDS)
    assert clipped.tolist() == [True, False, False, False, True]


def test_huge_log_ratio_does_not_overflow() -> None:
    with np.errstate(all="raise"):
        clipped = ratio_clipped(np.array([0.0]), np.array([-2000.0]), np.array([1.0]), **BOUNDS)
    assert clipped.tolist() == [True]


def test_band_is_exclusive() -> None:
    section = ClipCovLossSection(low=1.0, high=5.0)
    assert in_band(np.array([1.0, 1.1, 4.9, 5.0, np.nan, np.inf]), section).tolist() == [1, 2]


def test_mask_band_and_ratio_clip_exclude_by_hand() -> None:
    # Masked means: log-prob -2, advantage 1; covariances 2, 1, 0, 0, 0.
    logprobs = np.array([-1, -3, 50, -2, -2, -2], np.float32)
    sample = replace(
        make_sample(mask=[1, 1, 0, 1, 1, 1]),
        advantages=np.array([3, 0, 0, 1, 1, 0], np.float32),
        old_logprobs=np.array([-1, -3, 0, -2, -2, -2], np.float32),
    )
    assert _drop([sample], [logprobs], fraction=1.0)[0].tolist() == [1, 1, 0, 0, 0, 0]
    silenced = replace(sample, old_logprobs=sample.old_logprobs - np.float32(1.0))
    assert _drop([silenced], [logprobs], fraction=1.0)[0].tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_drops_nothing(bad: float) -> None:
    samples, logprobs = _random_update(6)
    at = np.flatnonzero(samples[0].response_mask)[0]
    logprobs[0][at] = bad
    assert not np.concatenate(_drop(samples, logprobs)).any()


@pytest.mark.parametrize(
    ("fraction", "tokens", "candidates", "count"),
    [(0.02, 120, 50, 2), (0.02, 30, 50, 1), (0.5, 100, 7, 7), (0.02, 30, 0, 0), (0.0, 999, 9, 0)],
)
def test_quota(fraction: float, tokens: int, candidates: int, count: int) -> None:
    assert drop_quota(fraction, tokens, candidates) == count


def test_same_tokens_in_any_order() -> None:
    samples, logprobs = _random_update(0)
    reference = {
        str(s.trajectory_id): d.tolist()
        for s, d in zip(samples, _drop(samples, logprobs), strict=True)
    }
    order = list(range(len(samples)))
    random.Random(1).shuffle(order)
    dropped = _drop([samples[i] for i in order], [logprobs[i] for i in order])
    for i, row in zip(order, dropped, strict=True):
        assert row.tolist() == reference[str(samples[i].trajectory_id)]


@pytest.mark.parametrize("seed", range(3))
def test_the_slow_reference(seed: int) -> None:
    """Token by token: exact means, the eligible, and of these the smallest draws."""
    samples, logprobs = _random_update(seed)
    samples[1] = replace(samples[1], segment=1, num_segments=2)
    rows = list(zip(samples, logprobs, strict=True))
    tokens = [(i, t) for i, (s, _) in enumerate(rows) for t in np.flatnonzero(s.response_mask)]
    mean_logprob = math.fsum(logprobs[i][t] for i, t in tokens) / len(tokens)
    mean_advantage = math.fsum(samples[i].advantages[t] for i, t in tokens) / len(tokens)
    drawn = []
    for i, t in tokens:
        advantage, logprob = float(samples[i].advantages[t]), float(logprobs[i][t])
        ratio = math.exp(logprob - float(samples[i].old_logprobs[t]))
        silent = -advantage * min(max(ratio, 0.8), 1.28) > -advantage * ratio
        covariance = (logprob - mean_logprob) * (advantage - mean_advantage)
        if 0.1 < covariance < 60.0 and not silent:
            draw = stream_key(5, 1, samples[i].trajectory_id.group)
            for counter in (samples[i].trajectory_id.member, samples[i].segment, t):
                (draw,) = stream_draws(np.array([draw], np.uint64), np.array([counter])).tolist()
            drawn.append((draw, i, t))
    expected = [np.zeros(20, bool) for _ in samples]
    for _, i, t in sorted(drawn)[: int(0.2 * len(tokens))]:
        expected[i][t] = True
    got = _drop(samples, logprobs, fraction=0.2, seed=5)
    assert [row.tolist() for row in got] == [row.tolist() for row in expected]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, logprobs = _random_update(3)
    whole = (
        _drop(samples, logprobs),
        kl_selected_tokens(samples, logprobs, fraction=0.1, seed=0, step=1),
    )
    monkeypatch.setattr(blocks_module, "BLOCK_TOKENS", 50)
    assert len(masked_blocks(samples, logprobs)) == 4
    cut = (
        _drop(samples, logprobs),
        kl_selected_tokens(samples, logprobs, fraction=0.1, seed=0, step=1),
    )
    for one, other in zip(whole, cut, strict=True):
        assert [row.tolist() for row in one] == [row.tolist() for row in other]


def test_drops_the_quota_of_masked_tokens_and_depends_on_the_key() -> None:
    samples, logprobs = _random_update(2)
    num_tokens = sum(int(sample.response_mask.sum()) for sample in samples)
    first = np.concatenate(_drop(samples, logprobs))
    assert first.sum() == int(0.1 * num_tokens)
    assert not (first & ~np.concatenate([s.response_mask for s in samples])).any()
    assert dropped_fraction(samples, _drop(samples, logprobs)) == first.sum() / num_tokens
    for other in ({"step": 2}, {"seed": 1}):
        assert (np.concatenate(_drop(samples, logprobs, **other)) != first).any()


def test_draw_is_uniform_over_the_eligible() -> None:
    sample = make_sample(mask=[1] * 8)
    logprobs = [np.array([-1, -1, -1, -1, -9, -9, -9, -9], np.float32)]
    sample = replace(
        sample,
        old_logprobs=logprobs[0],
        advantages=np.array([1, 1, 1, 1, 1, 1, 1, -9], np.float32),
    )
    counts = np.zeros(8)
    for step in range(1000):
        counts += _drop([sample], logprobs, fraction=0.125, step=step)[0]
    assert counts.sum() == 1000 and counts[4:7].sum() == 0
    assert abs(counts[counts > 0] - 200).max() < 65  # 5 standard deviations


def test_nothing_to_drop() -> None:
    assert _drop([], []) == []
    sample = make_sample(mask=[0, 0])
    assert not _drop([sample], [np.zeros(2, np.float32)])[0].any()
    assert dropped_fraction([sample], [np.zeros(2, bool)]) == 0.0


def test_kl_selects_the_highest_covariances_of_the_whole_update() -> None:
    samples, logprobs = _random_update(4)
    chosen = kl_selected_tokens(samples, logprobs, fraction=0.1, seed=0, step=1)
    mask = np.concatenate([s.response_mask for s in samples])
    flat = np.concatenate(chosen)
    assert [len(row) for row in chosen] == [len(s.token_ids) for s in samples]
    assert flat.sum() == int(0.1 * mask.sum()) and not (flat & ~mask).any()
    (block,) = masked_blocks(samples, logprobs)
    covariance = covariances(block.logprobs, block.advantages, masked_means([block]))
    assert covariance[flat[mask]].min() > covariance[~flat[mask]].max()
    order = list(reversed(range(len(samples))))
    again = kl_selected_tokens(
        [samples[i] for i in order], [logprobs[i] for i in order], fraction=0.1, seed=0, step=1
    )
    assert [row.tolist() for row in reversed(again)] == [row.tolist() for row in chosen]


def test_kl_selection_of_equal_covariances_is_a_keyed_draw() -> None:
    samples = [make_sample(member=i, mask=[1] * 8) for i in range(3)]
    logprobs = [np.full(8, -1.0, np.float32)] * 3

    def chosen(order: list[int], step: int) -> dict[int, list[bool]]:
        rows = kl_selected_tokens(
            [samples[i] for i in order],
            [logprobs[i] for i in order],
            fraction=0.21,
            seed=0,
            step=step,
        )
        return {i: row.tolist() for i, row in zip(order, rows, strict=True)}

    first = chosen([0, 1, 2], 1)
    assert sum(map(sum, first.values())) == 5
    assert chosen([2, 0, 1], 1) == first != chosen([0, 1, 2], 2)


def test_kl_selects_at_least_one_and_none_where_there_is_nothing() -> None:
    samples, logprobs = _random_update(5)

    def count(fraction: float) -> int:
        rows = kl_selected_tokens(samples, logprobs, fraction=fraction, seed=0, step=1)
        return sum(int(row.sum()) for row in rows)

    assert count(1e-6) == 1 and count(0.0) == 0
    assert kl_selected_tokens([], [], fraction=0.1, seed=0, step=1) == []
    empty = [make_sample(mask=[0, 0])]
    (row,) = kl_selected_tokens(empty, [np.zeros(2)], fraction=0.1, seed=0, step=1)
    assert row.tolist() == [False, False]
