"""The clipped loss against a slow reference; sums that add over micro-batches; finished metrics."""

import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_spear.algorithms.policy_loss import NllLoss, PolicyLoss, finish_metrics
from megatron_spear.algorithms.surrogates import Clipped, Gpg, KlCov
from megatron_spear.config.losses import KlCovLossSection, KlSection
from megatron_spear.config.method import AlgorithmSection
from megatron_spear.testing.loss_batch import LossFields, one_loss

LOSS = one_loss(Clipped(clip_low=0.2, clip_high=0.28, dual_clip=3.0))


def _batch(num_tokens: int = 64, seed: int = 0) -> tuple[Tensor, LossFields]:
    rng = torch.Generator().manual_seed(seed)
    logprobs = -2 * torch.rand(num_tokens, generator=rng, dtype=torch.float64)
    noise = torch.randn(num_tokens, generator=rng, dtype=torch.float64)
    weight = torch.rand(num_tokens, generator=rng, dtype=torch.float64)
    batch = LossFields(
        old_logprobs=logprobs + 0.5 * noise,
        advantages=torch.randn(num_tokens, generator=rng, dtype=torch.float64),
        token_weight=weight * (weight > 0.3),
        origin=(torch.arange(num_tokens) % 3 == 0).long(),
    )
    return logprobs.requires_grad_(), batch


def _slow_token(logprob: float, old: float, advantage: float, loss: Clipped) -> float:
    ratio = math.exp(max(-20.0, min(20.0, logprob - old)))
    clipped = max(1 - loss.clip_low, min(1 + loss.clip_high, ratio))
    value = max(-advantage * ratio, -advantage * clipped)
    if loss.dual_clip is not None and advantage < 0:
        value = min(value, -advantage * loss.dual_clip)
    return value


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_matches_the_slow_reference(dual_clip: float | None) -> None:
    loss = Clipped(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    logprobs, batch = _batch()
    total, _ = one_loss(loss)(logprobs, None, batch)
    rows = zip(
        logprobs.tolist(),
        batch.old_logprobs.tolist(),
        batch.advantages.tolist(),
        batch.token_weight.tolist(),
        strict=True,
    )
    assert total.item() == pytest.approx(
        sum(weight * _slow_token(lp, old, adv, loss) for lp, old, adv, weight in rows), rel=1e-12
    )


def test_gradient_by_hand() -> None:
    ratios = [1.1, 1.5, 0.5, 0.5, 1.5, 4.0]
    advantages = [2.0, 2.0, 2.0, -2.0, -2.0, -2.0]
    logprobs = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    batch = LossFields(
        old_logprobs=torch.zeros(6, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        token_weight=torch.full((6,), 0.1, dtype=torch.float64),
        origin=torch.ones(6, dtype=torch.long),
    )
    total, sums = LOSS(logprobs, None, batch)
    total.backward()
    # clipped above (A > 0), clipped below (A < 0) and dual-clipped tokens have no gradient
    assert logprobs.grad.tolist() == pytest.approx([-0.22, 0, -0.1, 0, 0.3, 0])
    metrics = finish_metrics(sums)
    assert metrics["replay/zero_gradient_fraction"] == pytest.approx(3 / 6)
    assert metrics["replay/clip_fraction"] == pytest.approx(2 / 6)
    assert metrics["replay/dual_clip_fraction"] == pytest.approx(1 / 6)
    assert metrics["replay/ratio_mean"] == pytest.approx(sum(ratios) / 6)
    assert metrics["loss/replay"] == pytest.approx(total.item())
    assert not any(name.startswith("policy/") for name in metrics)


def test_zero_gradient_metric_counts_exactly_the_tokens_without_gradient() -> None:
    logprobs, batch = _batch(300, seed=3)
    batch.origin = torch.ones_like(batch.origin)
    batch.old_logprobs[:5] = -50.0
    batch.advantages[5:9] = 0.0
    total, sums = LOSS(logprobs, None, batch)
    total.backward()
    trained = batch.token_weight != 0
    without = (logprobs.grad == 0) & trained
    assert sums["replay/sum_zero_gradient"].item() == without.sum().item() > 0


@pytest.mark.parametrize("cuts", [[10], [1, 2, 3, 50], [63]])
def test_micro_batches_add_up(cuts: list[int]) -> None:
    logprobs, batch = _batch()
    entropy = torch.rand(64, dtype=torch.float64)
    whole, whole_sums = LOSS(logprobs, entropy, batch)
    (whole_grad,) = torch.autograd.grad(whole, logprobs)
    total, sums = torch.zeros(()), dict.fromkeys(whole_sums, 0.0)
    bounds = [0, *cuts, 64]
    for start, end in pairwise(bounds):
        part = slice(start, end)
        value, part_sums = LOSS(logprobs[part], entropy[part], batch.part(part))
        total = total + value
        sums = {name: sums[name] + part_sums[name].item() for name in part_sums}
    (grad,) = torch.autograd.grad(total, logprobs)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=0)
    assert finish_metrics(sums) == pytest.approx(finish_metrics(whole_sums), rel=1e-10)
    assert {"policy/entropy", "replay/entropy", "policy/kl", "loss/policy"} <= set(
        finish_metrics(sums)
    )


def test_untrained_tokens_cannot_poison_the_loss() -> None:
    logprobs = torch.tensor([-1.0, float("-inf"), float("nan")], requires_grad=True)
    batch = LossFields(
        old_logprobs=torch.tensor([-1.0, 0.0, 0.0]),
        advantages=torch.tensor([1.0, 0.0, 0.0]),
        token_weight=torch.tensor([0.5, 0.0, 0.0]),
        origin=torch.zeros(3, dtype=torch.long),
    )
    total, sums = LOSS(logprobs, None, batch)
    total.backward()
    assert total.item() == -0.5 and logprobs.grad.tolist() == [-0.5, 0.0, 0.0]
    assert all(math.isfinite(value.item()) for value in sums.values())


def test_extreme_ratios_stay_finite() -> None:
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    batch = LossFields(
        old_logprobs=torch.tensor([-500.0, 0.0]),
        advantages=torch.tensor([-1.0, -1.0]),
        token_weight=torch.ones(2),
        origin=torch.zeros(2, dtype=torch.long),
    )
    total, _ = one_loss(Clipped(clip_low=0.2, clip_high=0.28))(logprobs, None, batch)
    assert math.isfinite(total.item())


def test_names_do_not_depend_on_what_the_batch_holds() -> None:
    logprobs, batch = _batch()
    _, mixed = LOSS(logprobs, None, batch)
    batch.origin = torch.zeros_like(batch.origin)
    _, on_policy = LOSS(logprobs, None, batch)
    assert list(mixed) == list(on_policy)


def test_from_section_and_pickle() -> None:
    algorithm = AlgorithmSection(entropy_coef=0.01, kl=KlSection(coef=0.1, estimator="k3"))
    loss = PolicyLoss.from_sections(algorithm, KlCovLossSection(coef=0.3), temperature=0.7)
    assert loss.on_policy == Clipped(clip_low=0.2, clip_high=0.28, dual_clip=10)
    assert loss.replay == KlCov(coef=0.3) and loss.temperature == 0.7
    assert (loss.entropy_coef, loss.kl_coef, loss.kl_estimator) == (0.01, 0.1, "k3")
    assert loss.entropy_grad
    assert pickle.loads(pickle.dumps(loss)) == loss


def test_nll() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    batch = LossFields(
        old_logprobs=torch.zeros(3),
        advantages=torch.zeros(3),
        token_weight=torch.tensor([0.3, 0.0, 1.0]),
        origin=torch.zeros(3, dtype=torch.long),
    )
    total, sums = NllLoss()(logprobs, None, batch)
    total.backward()
    assert total.item() == pytest.approx(3.3)
    assert logprobs.grad.tolist() == pytest.approx([-0.3, 0, -1.0])
    metrics = finish_metrics(sums)
    assert metrics["loss/sft"] == pytest.approx(3.3) and metrics["sft/nll"] == pytest.approx(2.0)
    assert finish_metrics(dict.fromkeys(sums, 0.0)) == {}


def test_new_and_replayed_tokens_have_losses_of_their_own() -> None:
    logprobs, batch = _batch()
    clipped, other = Clipped(clip_low=0.2, clip_high=0.28), Gpg()
    both, sums = PolicyLoss(on_policy=clipped, replay=other)(logprobs, None, batch)
    (gradient,) = torch.autograd.grad(both, logprobs)
    want = torch.zeros(64, dtype=torch.float64)
    for surrogate, code in ((clipped, 0), (other, 1)):
        total, _ = one_loss(surrogate)(logprobs, None, batch)
        (own,) = torch.autograd.grad(total, logprobs)
        want += torch.where(batch.origin == code, own, 0.0)
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=0)
    alone, alone_sums = one_loss(clipped)(logprobs, None, batch)
    assert both.item() != alone.item() and list(sums) == list(alone_sums)
    assert finish_metrics(sums)["loss/policy"] == finish_metrics(alone_sums)["loss/policy"]


def _regularized(weight: list[float]) -> tuple[Tensor, Tensor, LossFields]:
    count = len(weight)
    batch = LossFields(
        old_logprobs=torch.zeros(count, dtype=torch.float64),
        advantages=torch.zeros(count, dtype=torch.float64),
        token_weight=torch.tensor(weight, dtype=torch.float64),
        origin=torch.zeros(count, dtype=torch.long),
        regularizer_weight=torch.tensor(weight, dtype=torch.float64),
        ref_logprobs=torch.full((count,), -1.5, dtype=torch.float64),
    )
    logprobs = torch.full((count,), -1.0, dtype=torch.float64, requires_grad=True)
    entropy = torch.full((count,), 0.5, dtype=torch.float64, requires_grad=True)
    return logprobs, entropy, batch


def test_kl_and_entropy_by_hand() -> None:
    logprobs, entropy, batch = _regularized([0.1, 0.0])
    settings = {"on_policy": Gpg(), "replay": Gpg(), "kl_coef": 0.2, "entropy_coef": 0.01}
    total, sums = PolicyLoss(**settings)(logprobs, entropy, batch)
    total.backward()
    # d = 0.5: k2 is 0.125, its gradient 0.5; the second token has no weight
    assert total.item() == pytest.approx(0.2 * 0.1 * 0.125 - 0.01 * 0.1 * 0.5)
    assert logprobs.grad.tolist() == pytest.approx([0.2 * 0.1 * 0.5, 0.0])
    assert entropy.grad.tolist() == pytest.approx([-0.01 * 0.1, 0.0])
    metrics = finish_metrics(sums)
    assert metrics["loss/kl"] == pytest.approx(0.0025)
    assert metrics["loss/entropy"] == pytest.approx(-0.0005)
    assert metrics["policy/ref_kl"] == pytest.approx(0.125)


def test_a_dropped_token_keeps_its_kl_and_entropy() -> None:
    logprobs, entropy, batch = _regularized([0.1])
    batch.token_weight = torch.zeros(1, dtype=torch.float64)
    loss = PolicyLoss(on_policy=Gpg(), replay=Gpg(), kl_coef=0.2, entropy_coef=0.01)
    total, _ = loss(logprobs, entropy, batch)
    assert total.item() == pytest.approx(0.0025 - 0.0005)


def test_tokens_without_regularizer_cannot_poison_it() -> None:
    logprobs, entropy, batch = _regularized([0.1, 0.0])
    bad = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    loss = PolicyLoss(on_policy=Gpg(), replay=Gpg(), kl_coef=0.2, entropy_coef=0.01)
    batch.ref_logprobs = batch.ref_logprobs * bad
    total, _ = loss(logprobs * bad, entropy * bad, batch)
    total.backward()
    assert math.isfinite(total.item()) and math.isfinite(logprobs.grad[0].item())
