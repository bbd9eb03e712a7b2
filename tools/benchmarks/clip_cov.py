"""Covariance clipping against torch as the official code does it; a part of ``method.py``."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from megatron_spear.algorithms.covariance import dropped_tokens
from megatron_spear.algorithms.official.losses import OfficialClip, covariance_drop
from megatron_spear.config.losses import ClipCovLossSection
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.types import TrainSample

SECTION = ClipCovLossSection()


def rows(masked_tokens: int, rounds: int) -> list[tuple[str, str, str, str]]:
    """(what, ours, other, ratio) with few long samples and with many short ones.

    The other is given padded ``[B, T]`` tensors, ready made; or makes one row of the samples, as
    ours takes them.
    """
    found: list[tuple[str, str, str, str]] = []
    for count in (250, 1000):
        samples, logprobs = made_update(masked_tokens, count)
        ours = partial(
            dropped_tokens,
            samples,
            logprobs,
            SECTION,
            clip_low=SECTION.clip_low,
            clip_high=SECTION.clip_high,
            seed=0,
            step=1,
        )
        columns = [
            logprobs,
            [s.old_logprobs for s in samples],
            [s.advantages for s in samples],
            [s.response_mask for s in samples],
        ]
        tokens = sum(int(mask.sum()) for mask in columns[-1])
        padded = partial(plain_drop, *map(_padded, columns))
        one_row = partial(_one_row, columns)
        own, *others = interleaved([ours, padded, one_row], rounds)
        for name, other in zip(("padded tensors", "one row"), others, strict=True):
            what = f"clip_cov, {tokens:,} tokens in {count:,} samples; torch, {name}"
            ratio = statistics.median(b / a for a, b in zip(own, other, strict=True))
            mine, theirs = (f"{1e3 * statistics.median(s):.1f} ms" for s in (own, other))
            found.append((what, mine, theirs, f"{ratio:.1f}x faster (aim 1.5x)"))
    return found


def made_update(masked_tokens: int, count: int) -> tuple[list[TrainSample], list[np.ndarray]]:
    """Samples of 0.5 to 1.5 times the mean length and their log-probs, in groups of 8.

    Turns of 5 to 60 tokens, every other one masked: about half of the tokens.
    """
    draw = np.random.default_rng(0)
    samples, logprobs = [], []
    shares = draw.uniform(0.5, 1.5, count)
    for number, length in enumerate((shares / shares.sum() * 2 * masked_tokens).astype(int)):
        turns = draw.integers(5, 60, length // 5 + 1)
        mask = np.repeat(np.arange(len(turns)) % 2 == 1, turns)[:length]
        values = np.where(mask, -draw.exponential(1.0, length), 0).astype(np.float32)
        old = values + np.where(mask, draw.normal(0, 0.1, length), 0).astype(np.float32)
        advantage = float(draw.normal(0.0, 2.0))  # about a tenth of the tokens are in the band
        sample = make_sample(f"g{number // 8}", number % 8, mask=mask.tolist(), advantage=advantage)
        samples.append(replace(sample, old_logprobs=old))
        logprobs.append(values)
    return samples, logprobs


def plain_drop(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The straightforward way, ``[B, T]``: 0 on dropped tokens, 1 elsewhere."""
    clip = OfficialClip(**SECTION.model_dump(exclude={"type", "dual_clip"}))
    mask = mask.to(logprobs.dtype)
    ratio = (logprobs - old_logprobs).exp()
    clipped = -advantages * ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high) > -advantages * ratio
    drop = covariance_drop(logprobs, advantages, mask, clipped, clip, None)
    kept = torch.ones_like(mask)
    kept[drop.dropped[:, 0], drop.dropped[:, 1]] = 0.0
    return kept


def _padded(column: Sequence[np.ndarray]) -> torch.Tensor:
    tensors = [torch.from_numpy(row) for row in column]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)


def _one_row(columns: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
    return plain_drop(*(torch.from_numpy(np.concatenate(column))[None] for column in columns))


def interleaved(ways: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each way in each round, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in ways]
    for round_ in range(rounds + 1):
        for way, own in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            if round_:
                own.append(time.perf_counter() - start)
    return seconds
