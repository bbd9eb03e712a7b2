"""The official code's numbers by hand, its defects included; recorded ones are in tests/golden."""

import math

import numpy as np
import pytest
import torch

from megatron_spear.algorithms.official import losses as official_losses
from megatron_spear.algorithms.official.losses import OfficialClip
from megatron_spear.algorithms.official.masked import (
    MODES,
    aggregate,
    masked_mean,
    masked_variance,
    masked_whiten,
)
from megatron_spear.algorithms.official.sil import recalibrate, sil_loss
from megatron_spear.errors import ConfigError

MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
LOSSES = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
CLIP = OfficialClip(clip_low=0.2, clip_high=0.28, fraction=0.5, low=0.1, high=40.0)


@pytest.mark.parametrize(("mode", "value"), zip(MODES, [2.0, 3.0, 2.25, 3.0, 3.0], strict=True))
def test_aggregate(mode: str, value: float) -> None:
    assert aggregate(LOSSES, MASK, mode).item() == pytest.approx(value)


def test_aggregate_by_group_empty_rows_and_unknown() -> None:
    assert aggregate(LOSSES, MASK, "seq-norm-token-sum", group_size=2).item() == pytest.approx(1.0)
    empty = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert math.isnan(aggregate(LOSSES, empty, "seq-mean-token-mean").item())
    assert aggregate(LOSSES, torch.zeros(2, 2), "token-mean").item() == 0.0
    with pytest.raises(ConfigError, match="seq-mean"):
        aggregate(LOSSES, MASK, "mean")


def test_masked_statistics() -> None:
    values = torch.tensor([[1.0, 3.0, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    assert masked_mean(values, mask).item() == pytest.approx(2.0)
    assert masked_variance(values, mask).item() == pytest.approx(2.0)
    half = 1 / math.sqrt(2)
    assert masked_whiten(values, mask)[0, :2].tolist() == pytest.approx([-half, half])
    with pytest.raises(ValueError, match="at least 2"):
        masked_variance(values, torch.tensor([[1.0, 0.0, 0.0]]))


def test_clip_cov_draws_from_the_band_and_does_not_clamp() -> None:
    logprobs = torch.tensor([[-1.0, -3.0, -1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[2.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.float64)
    for permutation, dropped in (([3, 0, 1, 2], [3, 0]), ([2, 1, 0, 3], [2, 1])):
        result, drop = official_losses.clip_cov(
            logprobs,
            logprobs.detach(),
            advantages,
            mask,
            CLIP,
            aggregation="seq-mean-token-sum",
            permutation=torch.tensor(permutation),
        )
        assert drop.dropped[:, 1].tolist() == dropped and drop.quota == 2
        kept_sum = sum(-advantages[0, i].item() for i in range(4) if i not in dropped)
        assert result.loss.item() == pytest.approx(kept_sum)
        assert result.clip_fraction.item() == pytest.approx(0.5)
    far = torch.full((1, 4), -2000.0, dtype=torch.float64)
    result, _ = official_losses.clip_cov(
        logprobs, far, -advantages, mask, CLIP, aggregation="token-mean"
    )
    assert not math.isfinite(result.loss.item())  # defect 13


def test_a_drawn_permutation_follows_the_global_generator() -> None:
    logprobs, advantages = torch.randn(4, 8), torch.randn(4, 8)

    def dropped() -> list[list[int]]:
        torch.manual_seed(3)
        _, drop = official_losses.clip_cov(
            logprobs, logprobs, advantages, torch.ones(4, 8), CLIP, aggregation="token-mean"
        )
        return drop.dropped.tolist()

    assert dropped() == dropped() != []


def test_kl_cov_without_tokens_or_fraction() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-2.0, -2.0]])
    for mask, fraction in ((torch.zeros(1, 2), 0.5), (torch.ones(1, 2), 0.0)):
        result = official_losses.kl_cov(
            logprobs,
            old,
            torch.zeros(1, 2),
            mask,
            fraction=fraction,
            coef=0.1,
            aggregation="seq-mean-token-sum",
        )
        assert result.loss.item() == 0.0


def test_recalibration() -> None:
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    baseline, advantages, keep = recalibrate(
        torch.tensor([1.0, 0.0, 1.0]), mask, np.array([0.0, 0.5, 1.0])
    )
    assert baseline == 0.5
    assert advantages.tolist() == [[0.5, 0.0], [-0.5, -0.5], [0.0, 0.0]]
    assert keep.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("mode", "value"),
    [("token-mean", 0.0), ("seq-mean-token-sum-norm", 0.0), ("seq-mean-token-sum", math.nan)],
)
def test_sil_loss_without_a_kept_row_is_that_of_no_rows(mode: str, value: float) -> None:
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)
    result = sil_loss(
        logprobs,
        logprobs.detach(),
        torch.ones(1, 2),
        torch.tensor([0.5]),  # ties with P50
        np.array([0.5]),
        CLIP,
        aggregation=mode,
        mini_batch_rows=4,
        weight=0.1,
    )
    assert result.keep.tolist() == [False]
    assert result.scaled.item() == pytest.approx(value, nan_ok=True)


def test_sil_loss_is_scaled_by_the_kept_share_and_gamma() -> None:
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    result = sil_loss(
        logprobs,
        logprobs.detach(),
        torch.ones(2, 2),
        torch.tensor([1.0, 0.0]),
        np.array([0.5]),
        CLIP,
        aggregation="seq-mean-token-sum",
        mini_batch_rows=4,
        weight=0.1,
    )
    result.scaled.backward()
    assert result.unscaled.loss.item() == pytest.approx(-1.0)
    assert result.scaled.item() == pytest.approx(-1.0 * 1 / 4 * 0.1)
    assert logprobs.grad.flatten().tolist() == pytest.approx([-0.0125, -0.0125, 0, 0])
