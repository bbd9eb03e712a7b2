"""Token weights and drops of the official micro-batches against the official losses themselves."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.aggregation import token_weights
from megatron_spear.algorithms.official.filters import shuffled
from megatron_spear.algorithms.official.losses import OfficialClip, clip_cov, kl_cov, vanilla
from megatron_spear.algorithms.official.masked import MODES
from megatron_spear.algorithms.official.micro_batches import (
    official_dropped,
    official_kl_selected,
    official_token_weights,
)
from megatron_spear.algorithms.surrogates import Clipped, KlCov, Surrogate
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.loss_batch import LossFields, one_loss
from megatron_spear.types import TrainSample

CLIP = OfficialClip(clip_low=0.2, clip_high=0.28, fraction=0.2, low=0.01, high=5.0)
ROWS, MICRO, WIDTH, SCALE = 10, 4, 12, 0.3


def _rows() -> tuple[list[TrainSample], list[np.ndarray]]:
    """Ten rows of 3 to 12 response tokens between observations, and their present log-probs."""
    draw = np.random.default_rng(0)
    samples, current = [], []
    for member in range(ROWS):
        mask = np.zeros(20, bool)
        mask[draw.choice(np.arange(1, 20), draw.integers(3, WIDTH + 1), replace=False)] = True
        old = draw.normal(-1.0, 0.5, 20)
        samples.append(
            make_sample(
                "g",
                member,
                mask=mask,
                advantage=draw.normal(),
                old_logprobs=old.astype(np.float32),
            )
        )
        current.append(old + draw.normal(0, 0.3, 20))
    return samples, current


def _padded(rows: list[TrainSample], columns: list[Any]) -> torch.Tensor:
    out = torch.zeros(len(rows), WIDTH, dtype=torch.float64)
    for i, (row, values) in enumerate(zip(rows, columns, strict=True)):
        own = torch.from_numpy(np.asarray(values, np.float64)[row.response_mask])
        out[i, : len(own)] = own
    return out


def _chunk(rows: list[TrainSample], current: list[np.ndarray]) -> list[torch.Tensor]:
    """Log-probs, old log-probs, advantages and mask ``[B, T]``."""
    columns = [
        current,
        [row.old_logprobs for row in rows],
        [row.advantages for row in rows],
        [row.response_mask for row in rows],
    ]
    return [_padded(rows, column) for column in columns]


def _ours(
    rows: list[TrainSample],
    current: list[np.ndarray],
    weights: list[np.ndarray],
    surrogate: Surrogate,
    selected: list[np.ndarray] | None = None,
) -> float:
    """The plain sum of the package's loss."""
    flat = {
        "old_logprobs": torch.from_numpy(np.concatenate([r.old_logprobs for r in rows])).double(),
        "advantages": torch.from_numpy(np.concatenate([r.advantages for r in rows])).double(),
        "token_weight": torch.from_numpy(np.concatenate(weights)),
        "kl_selected": torch.from_numpy(np.concatenate(selected)) if selected else None,
    }
    batch = LossFields(**flat, origin=torch.zeros(len(flat["token_weight"]), dtype=torch.long))
    return one_loss(surrogate)(torch.from_numpy(np.concatenate(current)), None, batch)[0].item()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "seq-norm-token-sum"])
def test_a_plain_sum_equals_the_official_loss(mode: str) -> None:
    rows, current = _rows()
    expected = 0.0
    for start in range(0, ROWS, MICRO):
        part = slice(start, start + MICRO)
        own = rows[part]
        loss = vanilla(
            *_chunk(own, current[part]),
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=10.0,
            aggregation=mode,
        ).loss
        expected += loss.item() * len(own) / ROWS * SCALE
    weights = official_token_weights(rows, MICRO, mode, WIDTH, scale=SCALE)
    surrogate = Clipped(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    assert _ours(rows, current, weights, surrogate) == pytest.approx(expected, rel=1e-9)


def test_clip_cov_drops_by_micro_batch() -> None:
    rows, current = _rows()
    expected, dropped = 0.0, 0
    for number, start in enumerate(range(0, ROWS, MICRO)):
        part = slice(start, start + MICRO)
        columns = _chunk(rows[part], current[part])
        _, drop = clip_cov(*columns, CLIP, aggregation="seq-mean-token-sum-norm")
        order = shuffled(np.arange(len(drop.eligible)), 7, 3, "official clip_cov", number)
        loss, drop = clip_cov(
            *columns,
            CLIP,
            aggregation="seq-mean-token-sum-norm",
            permutation=torch.from_numpy(order),
        )
        expected += loss.loss.item() * len(rows[part]) / ROWS
        dropped += len(drop.dropped)
    weights = official_token_weights(rows, MICRO, "seq-mean-token-sum-norm", WIDTH)
    flags = official_dropped(rows, current, MICRO, CLIP, 7, 3)
    assert sum(int(row.sum()) for row in flags) == dropped > 5
    kept = [np.where(flag, 0.0, weight) for flag, weight in zip(flags, weights, strict=True)]
    surrogate = Clipped(clip_low=0.2, clip_high=0.28, clamp=False)
    assert _ours(rows, current, kept, surrogate) == pytest.approx(expected, rel=1e-9)


def test_kl_cov_selects_by_micro_batch() -> None:
    rows, current = _rows()
    expected = 0.0
    for start in range(0, ROWS, MICRO):
        part = slice(start, start + MICRO)
        loss = kl_cov(
            *_chunk(rows[part], current[part]), fraction=0.1, coef=0.3, aggregation="token-mean"
        ).loss
        expected += loss.item() * len(rows[part]) / ROWS
    weights = official_token_weights(rows, MICRO, "token-mean", WIDTH)
    selected = official_kl_selected(rows, current, MICRO, 0.1)
    assert _ours(rows, current, weights, KlCov(coef=0.3), selected) == pytest.approx(
        expected, rel=1e-6
    )


def test_the_micro_batch_size_moves_the_official_weights_only() -> None:
    """Defect 11: a sum over rows times the rows' share; halving the micro-batch halves the loss."""
    rows, _ = _rows()
    mode = "seq-mean-token-sum-norm"
    sums = {
        size: sum(w.sum() for w in official_token_weights(rows, size, mode, WIDTH))
        for size in (1, 5, 10)
    }
    assert sums[5] == pytest.approx(sums[10] / 2) and sums[1] == pytest.approx(sums[10] / 10)
    corrected = sum(w.sum() for w in token_weights(rows, mode, WIDTH))
    assert corrected == pytest.approx(sums[10] / ROWS), "the mean over rows, whatever the cut"
