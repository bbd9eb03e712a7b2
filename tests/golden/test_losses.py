"""Losses, KL, masked statistics and log-probs against numbers computed by the official code.

``official_*`` reproduces the official functions; the default losses are held to the same numbers
where a choice of weights makes them equal. Tolerances and skips are ``test_method``'s.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import assert_match, cases
from torch import Tensor

from megatron_spear.algorithms.covariance import kl_selected_tokens
from megatron_spear.algorithms.kl import kl_estimate
from megatron_spear.algorithms.logprobs import token_logprobs
from megatron_spear.algorithms.official import losses as official_losses
from megatron_spear.algorithms.official import masked as official_masked
from megatron_spear.algorithms.official.losses import OfficialClip, OfficialLoss
from megatron_spear.algorithms.official.masked import aggregate
from megatron_spear.algorithms.official.sil import sil_loss
from megatron_spear.algorithms.unclipped_losses import GpgLoss, KlCovLoss
from megatron_spear.curriculum.schedules import cosine_warmup
from megatron_spear.testing.hand_made import make_sample

Case = dict[str, Any]


@dataclass
class Batch:
    """The fields a loss reads."""

    old_logprobs: Tensor
    advantages: Tensor
    token_weight: Tensor
    origin: Tensor
    kl_selected: Tensor


def _tensors(case: Case) -> dict[str, Tensor]:
    """The inputs in the case's dtype; ``log_prob`` asks for its gradient."""
    dtype = getattr(torch, case["params"]["dtype"])
    found = {k: torch.tensor(v, dtype=dtype) for k, v in case["inputs"].items() if k != "perm"}
    if "log_prob" in found:
        found["log_prob"].requires_grad_()
    return found


def _assert_loss(got: OfficialLoss, logprobs: Tensor, case: Case) -> None:
    dtype, expected = case["params"]["dtype"], case["expected"]
    got.loss.backward()
    assert_match(got.loss.item(), expected["pg_loss"], dtype)
    assert_match(got.clip_fraction.item(), expected["pg_clipfrac"], dtype)
    assert_match(got.kl.item(), expected["ppo_kl"], dtype)
    assert_match(got.dual_clip_fraction.item(), expected["pg_clipfrac_lower"], dtype)
    assert_match(logprobs.grad, expected["grad_log_prob"], dtype)


def _clip(params: Case) -> OfficialClip:
    return OfficialClip(
        clip_low=params["clip_low"],
        clip_high=params["clip_high"],
        fraction=params["cov_ratio"],
        low=params["cov_lb"],
        high=params["cov_ub"],
    )


def _permutation(case: Case) -> Tensor:
    return torch.tensor(case["inputs"]["perm"], dtype=torch.long)


@pytest.mark.parametrize("case", cases("policy_loss_vanilla"))
def test_official_vanilla(case: Case) -> None:
    params, t = case["params"], _tensors(case)
    got = official_losses.vanilla(
        t["log_prob"],
        t["old_log_prob"],
        t["advantages"],
        t["mask"],
        clip_low=params["clip_low"],
        clip_high=params["clip_high"],
        dual_clip=params["dual_clip_c"],
        aggregation=params["agg"],
    )
    _assert_loss(got, t["log_prob"], case)


@pytest.mark.parametrize("case", cases("policy_loss_clip_cov"))
def test_official_clip_cov(case: Case) -> None:
    params, expected, t = case["params"], case["expected"], _tensors(case)
    got, drop = official_losses.clip_cov(
        t["log_prob"],
        t["old_log_prob"],
        t["advantages"],
        t["mask"],
        _clip(params),
        aggregation=params["agg"],
        permutation=_permutation(case),
    )
    _assert_loss(got, t["log_prob"], case)
    assert_match(drop.covariance, expected["covariance"], params["dtype"])
    assert drop.eligible.tolist() == expected["eligible"]
    assert sorted(drop.dropped.tolist()) == sorted(expected["dropped"])
    assert drop.quota == expected["n_clip"]


@pytest.mark.parametrize("case", cases("policy_loss_kl_cov"))
def test_official_kl_cov(case: Case) -> None:
    params, t = case["params"], _tensors(case)
    got = official_losses.kl_cov(
        t["log_prob"],
        t["old_log_prob"],
        t["advantages"],
        t["mask"],
        fraction=params["kl_cov_ratio"],
        coef=params["ppo_kl_coef"],
        aggregation=params["agg"],
    )
    _assert_loss(got, t["log_prob"], case)


@pytest.mark.parametrize("case", cases("policy_loss_gpg"))
def test_official_gpg(case: Case) -> None:
    t = _tensors(case)
    got = official_losses.gpg(
        t["log_prob"], t["advantages"], t["mask"], aggregation=case["params"]["agg"]
    )
    _assert_loss(got, t["log_prob"], case)


def _official_weights(mask: Tensor, mode: str) -> Tensor:
    """Token weights ``[B * T]`` that make a plain sum equal the official aggregation."""
    ones = torch.ones_like(mask, requires_grad=True)
    aggregate(ones, mask, mode).backward()
    return ones.grad.flatten()


@pytest.mark.parametrize("case", cases("policy_loss_kl_cov"))
def test_kl_cov_of_the_whole_update(case: Case) -> None:
    params, expected, t = case["params"], case["expected"], _tensors(case)
    mask = t["mask"] > 0
    samples = [
        make_sample(member=i, mask=row, advantages=advantages)
        for i, (row, advantages) in enumerate(
            zip(mask.numpy(), t["advantages"].numpy(), strict=True)
        )
    ]
    current = list(t["log_prob"].detach().numpy())
    selected = kl_selected_tokens(samples, current, fraction=params["kl_cov_ratio"], seed=0, step=1)
    quota = max(int(params["kl_cov_ratio"] * mask.sum().item()), 1)
    assert sum(int(row.sum()) for row in selected) == quota
    if len(t["advantages"][mask].unique()) == 1:
        return  # every covariance is 0: here a draw decides, there rounding does
    batch = Batch(
        old_logprobs=t["old_log_prob"].flatten(),
        advantages=t["advantages"].flatten(),
        token_weight=_official_weights(t["mask"], params["agg"]),
        origin=torch.zeros(mask.numel(), dtype=torch.long),
        kl_selected=torch.from_numpy(np.concatenate(selected)),
    )
    total, _ = KlCovLoss(coef=params["ppo_kl_coef"])(t["log_prob"].flatten(), None, batch)
    total.backward()
    assert_match(total.item(), expected["pg_loss"], params["dtype"])
    assert_match(t["log_prob"].grad, expected["grad_log_prob"], params["dtype"])


@pytest.mark.parametrize("case", cases("policy_loss_gpg"))
def test_gpg(case: Case) -> None:
    params, expected, t = case["params"], case["expected"], _tensors(case)
    count = t["mask"].numel()
    batch = Batch(
        old_logprobs=torch.zeros(count),
        advantages=t["advantages"].flatten(),
        token_weight=_official_weights(t["mask"], params["agg"]),
        origin=torch.zeros(count, dtype=torch.long),
        kl_selected=torch.zeros(count, dtype=torch.bool),
    )
    total, _ = GpgLoss()(t["log_prob"].flatten(), None, batch)
    total.backward()
    assert_match(total.item(), expected["pg_loss"], params["dtype"])
    assert_match(t["log_prob"].grad, expected["grad_log_prob"], params["dtype"])


@pytest.mark.parametrize("case", cases("agg_loss"))
def test_official_aggregation(case: Case) -> None:
    t = _tensors(case)
    for name, expected in case["expected"].items():
        mode, _, size = name.partition("@rollout_n=")
        got = aggregate(t["loss_mat"], t["mask"], mode, group_size=int(size) if size else None)
        assert_match(got, float(expected), case["params"]["dtype"])


@pytest.mark.parametrize("case", cases("masked_ops"))
def test_masked_statistics(case: Case) -> None:
    t, expected = _tensors(case), case["expected"]
    both = t["values"], t["mask"]
    got = {
        "masked_sum": official_masked.masked_sum(*both),
        "masked_mean": official_masked.masked_mean(*both),
        "masked_mean_axis1": official_masked.masked_mean(*both, dim=1),
        "masked_var": official_masked.masked_variance(*both),
        "masked_whiten": official_masked.masked_whiten(*both),
        "masked_whiten_noshift": official_masked.masked_whiten(*both, shift_mean=False),
    }
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert_match(value, expected[name], case["params"]["dtype"])


@pytest.mark.parametrize("case", cases("kl_penalty"))
def test_kl(case: Case) -> None:
    t = _tensors(case)
    for kind, expected in case["expected"].items():
        got = kl_estimate(t["log_prob"].detach(), t["ref_log_prob"], kind)
        assert_match(got, expected, case["params"]["dtype"])


@pytest.mark.parametrize("case", cases("logprob_entropy"))
def test_logprobs_and_entropy(case: Case) -> None:
    params, expected = case["params"], case["expected"]
    logits = _tensors(case)["logits"]
    labels = torch.tensor(case["inputs"]["labels"])
    logprobs, entropy = token_logprobs(
        logits.flatten(0, 1),
        labels.flatten(),
        temperature=params["temperature"],
        with_entropy=True,
    )
    logprobs = logprobs.reshape(labels.shape)
    assert_match(logprobs, expected["logprobs_naive"], params["dtype"])
    assert_match(logprobs, expected["logprobs_v2"], params["dtype"])
    assert_match(entropy.reshape(labels.shape), expected["entropy"], params["dtype"])


@pytest.mark.parametrize("case", cases("sil_composite_loss"))
def test_sil(case: Case) -> None:
    params, expected, t = case["params"], case["expected"], _tensors(case)
    dtype = params["dtype"]
    weight = params["replay_loss_coef"] * cosine_warmup(
        params["global_step"], params["max_replay_loss_steps"]
    )
    got = sil_loss(
        t["log_prob"],
        t["old_log_prob"],
        t["mask"],
        t["rewards"],
        np.array(case["inputs"]["group_mean_history"]),
        _clip(params),
        aggregation=params["agg"],
        mini_batch_rows=params["mini_batch_size"],
        weight=weight,
        permutation=_permutation(case),
    )
    assert_match(weight, expected["weight"], dtype)
    assert_match(got.baseline, expected["p50"], dtype)
    assert_match(got.advantages, expected["advantages"], dtype)
    assert got.keep.tolist() == expected["keep"]
    assert_match(got.unscaled.loss.item(), expected["pg_loss"], dtype)
    assert_match(got.unscaled.clip_fraction.item(), expected["pg_clipfrac"], dtype)
    assert_match(got.unscaled.kl.item(), expected["ppo_kl"], dtype)
    assert_match(got.scaled.item(), expected["scaled_loss"], dtype)
    (gradient,) = torch.autograd.grad(got.unscaled.loss, t["log_prob"])
    assert_match(gradient[got.keep], expected["grad_log_prob_kept_unscaled"], dtype)
    assert not gradient[~got.keep].any()
