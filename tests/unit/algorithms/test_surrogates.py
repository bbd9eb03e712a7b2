"""KL-Cov and GPG: hand numbers, sums that add over micro-batches, poison, pickling."""

import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_spear.algorithms.policy_loss import TokenLoss, finish_metrics
from megatron_spear.algorithms.surrogates import Gpg, KlCov
from megatron_spear.testing.loss_batch import LossFields, one_loss

LOSSES = [one_loss(KlCov(coef=0.1), 0.7), one_loss(Gpg(), 0.7)]


def _batch(num_tokens: int = 64) -> tuple[Tensor, LossFields]:
    rng = torch.Generator().manual_seed(0)
    logprobs = -2 * torch.rand(num_tokens, generator=rng, dtype=torch.float64)
    weight = torch.rand(num_tokens, generator=rng, dtype=torch.float64)
    batch = LossFields(
        old_logprobs=logprobs + torch.randn(num_tokens, generator=rng, dtype=torch.float64),
        advantages=torch.randn(num_tokens, generator=rng, dtype=torch.float64),
        token_weight=weight * (weight > 0.3),
        origin=(torch.arange(num_tokens) % 3 == 0).long(),
        kl_selected=torch.rand(num_tokens, generator=rng) < 0.2,
    )
    return logprobs.requires_grad_(), batch


def _hand_batch(selected: list[bool], advantages: list[float]) -> LossFields:
    count = len(selected)
    return LossFields(
        old_logprobs=torch.zeros(count, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        token_weight=torch.full((count,), 0.1, dtype=torch.float64),
        origin=torch.zeros(count, dtype=torch.long),
        kl_selected=torch.tensor(selected),
    )


def test_kl_cov_by_hand() -> None:
    ratios = [1.5, 1.5, 0.5, 1.0, 0.5]
    logprobs = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    batch = _hand_batch([False, True, True, True, False], [2.0, 2.0, -2.0, 0.0, 0.0])
    total, sums = one_loss(KlCov(coef=0.1))(logprobs, None, batch)
    total.backward()
    penalties = 0.1 * math.log(1.5) + 0.1 * math.log(2)
    assert total.item() == pytest.approx(0.1 * (-3 - 3 + 1 + penalties))
    # nothing is clipped; the penalty pulls the selected tokens back, and is flat at ratio 1
    assert logprobs.grad.tolist() == pytest.approx([-0.3, -0.29, 0.09, 0.0, 0.0])
    metrics = finish_metrics(sums)
    assert metrics["policy/kl_selected_fraction"] == pytest.approx(3 / 5)
    assert metrics["policy/zero_gradient_fraction"] == pytest.approx(2 / 5)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0)
    assert metrics["loss/policy"] == pytest.approx(total.item())


def test_kl_cov_clamps_the_log_ratio() -> None:
    logprobs = torch.tensor([0.0, -500.0], dtype=torch.float64, requires_grad=True)
    batch = _hand_batch([True, True], [1.0, 1.0])
    batch.old_logprobs = torch.tensor([-500.0, 0.0], dtype=torch.float64)
    total, sums = one_loss(KlCov(coef=0.1))(logprobs, None, batch)
    total.backward()
    assert total.item() == pytest.approx(0.1 * (-math.exp(20) - math.exp(-20) + 4))
    assert logprobs.grad.tolist() == [0.0, 0.0]
    assert finish_metrics(sums)["policy/zero_gradient_fraction"] == 1.0


def test_gpg_by_hand() -> None:
    logprobs = torch.tensor([-2.0, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    total, sums = one_loss(Gpg())(logprobs, None, _hand_batch([False] * 3, [0.5, -1.0, 0.0]))
    total.backward()
    assert total.item() == pytest.approx(0.1 * (1.0 - 1.0))
    assert logprobs.grad.tolist() == pytest.approx([-0.05, 0.1, 0.0])
    metrics = finish_metrics(sums)
    assert metrics["policy/zero_gradient_fraction"] == pytest.approx(1 / 3)
    assert metrics["policy/kl"] == pytest.approx(2.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cuts", [[10], [1, 2, 3, 50], [63]])
def test_micro_batches_add_up(loss: TokenLoss, cuts: list[int]) -> None:
    logprobs, batch = _batch()
    entropy = torch.rand(64, dtype=torch.float64)
    whole, whole_sums = loss(logprobs, entropy, batch)
    (whole_grad,) = torch.autograd.grad(whole, logprobs)
    total, sums = torch.zeros(()), dict.fromkeys(whole_sums, 0.0)
    for start, end in pairwise([0, *cuts, 64]):
        part = slice(start, end)
        value, part_sums = loss(logprobs[part], entropy[part], batch.part(part))
        assert list(part_sums) == list(whole_sums)
        total = total + value
        sums = {name: sums[name] + part_sums[name].item() for name in part_sums}
    (grad,) = torch.autograd.grad(total, logprobs)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=0)
    assert finish_metrics(sums) == pytest.approx(finish_metrics(whole_sums), rel=1e-10)
    assert {"policy/entropy", "replay/kl", "loss/replay"} <= set(finish_metrics(sums))


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_gradient_metric_counts_the_tokens_without_gradient(loss: TokenLoss) -> None:
    logprobs, batch = _batch()
    batch.origin[:] = 0
    batch.advantages[:9] = 0.0
    batch.kl_selected[:4] = True
    total, sums = loss(logprobs, None, batch)
    total.backward()
    without = (logprobs.grad == 0) & (batch.token_weight != 0)
    assert sums["policy/sum_zero_gradient"].item() == without.sum().item() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_untrained_tokens_cannot_poison_the_loss(loss: TokenLoss) -> None:
    logprobs = torch.tensor([-1.0, float("-inf"), float("nan")], requires_grad=True)
    batch = LossFields(
        old_logprobs=torch.tensor([-1.0, 0.0, 0.0]),
        advantages=torch.tensor([1.0, 0.0, 0.0]),
        token_weight=torch.tensor([0.5, 0.0, 0.0]),
        origin=torch.zeros(3, dtype=torch.long),
        kl_selected=torch.tensor([False, True, True]),
    )
    total, sums = loss(logprobs, None, batch)
    total.backward()
    assert abs(total.item()) == 0.5 and logprobs.grad.tolist() == [-0.5, 0.0, 0.0]
    assert all(math.isfinite(value.item()) for value in sums.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_pickles(loss: TokenLoss) -> None:
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert loss.temperature == 0.7 and loss.needs_entropy
