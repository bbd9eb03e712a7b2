"""Official losses, aggregation, masked statistics, KL and log-probs against recorded numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_spear.algorithms.kl import kl_estimate
from megatron_spear.algorithms.logprobs import token_logprobs
from megatron_spear.algorithms.official import losses, masked
from megatron_spear.algorithms.official.losses import OfficialClip, OfficialLoss
from megatron_spear.algorithms.official.masked import aggregate
from megatron_spear.algorithms.official.sil import sil_loss
from megatron_spear.curriculum.schedules import cosine_warmup
from megatron_spear.testing.golden.compare import (
    Case,
    Check,
    named_differences,
    number_differences,
    value_differences,
)


def tensors(case: Case) -> dict[str, Tensor]:
    """The inputs in the case's dtype ("nan" is a number); ``log_prob`` asks for its gradient."""
    inputs = {k: v for k, v in case["inputs"].items() if k != "perm"}
    found = {k: torch.from_numpy(np.array(v, case["params"]["dtype"])) for k, v in inputs.items()}
    if "log_prob" in found:
        found["log_prob"].requires_grad_()
    return found


def _ratio_inputs(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every loss with a ratio begins with."""
    return t["log_prob"], t["old_log_prob"], t["advantages"], t["mask"]


def _loss_differences(got: OfficialLoss, logprobs: Tensor, case: Case) -> Iterator[str]:
    got.loss.backward()
    values = {
        "pg_loss": got.loss.item(),
        "pg_clipfrac": got.clip_fraction.item(),
        "ppo_kl": got.kl.item(),
        "pg_clipfrac_lower": got.dual_clip_fraction.item(),
        "grad_log_prob": logprobs.grad,
    }
    recorded = {name: case["expected"][name] for name in values}
    yield from named_differences(values, recorded, case["params"]["dtype"])


def _clip(params: dict[str, Any]) -> OfficialClip:
    return OfficialClip(
        clip_low=params["clip_low"],
        clip_high=params["clip_high"],
        fraction=params["cov_ratio"],
        low=params["cov_lb"],
        high=params["cov_ub"],
    )


def _permutation(case: Case) -> Tensor:
    return torch.tensor(case["inputs"]["perm"], dtype=torch.long)


def check_vanilla(case: Case) -> Iterator[str]:
    params, t = case["params"], tensors(case)
    got = losses.vanilla(
        *_ratio_inputs(t),
        clip_low=params["clip_low"],
        clip_high=params["clip_high"],
        dual_clip=params["dual_clip_c"],
        aggregation=params["agg"],
    )
    yield from _loss_differences(got, t["log_prob"], case)


def check_clip_cov(case: Case) -> Iterator[str]:
    params, expected, t = case["params"], case["expected"], tensors(case)
    got, drop = losses.clip_cov(
        *_ratio_inputs(t),
        _clip(params),
        aggregation=params["agg"],
        permutation=_permutation(case),
    )
    yield from _loss_differences(got, t["log_prob"], case)
    yield from number_differences(
        "covariance", drop.covariance, expected["covariance"], params["dtype"]
    )
    yield from value_differences("eligible", drop.eligible.tolist(), expected["eligible"])
    dropped = sorted(drop.dropped.tolist())
    yield from value_differences("dropped", dropped, sorted(expected["dropped"]))
    yield from value_differences("n_clip", drop.quota, expected["n_clip"])


def check_kl_cov(case: Case) -> Iterator[str]:
    params, t = case["params"], tensors(case)
    got = losses.kl_cov(
        *_ratio_inputs(t),
        fraction=params["kl_cov_ratio"],
        coef=params["ppo_kl_coef"],
        aggregation=params["agg"],
    )
    yield from _loss_differences(got, t["log_prob"], case)


def check_gpg(case: Case) -> Iterator[str]:
    t = tensors(case)
    got = losses.gpg(t["log_prob"], t["advantages"], t["mask"], aggregation=case["params"]["agg"])
    yield from _loss_differences(got, t["log_prob"], case)


def check_aggregation(case: Case) -> Iterator[str]:
    t = tensors(case)
    for name, recorded in case["expected"].items():
        mode, _, size = name.partition("@rollout_n=")
        got = aggregate(t["loss_mat"], t["mask"], mode, group_size=int(size) if size else None)
        yield from number_differences(name, got, recorded, case["params"]["dtype"])


def check_masked_statistics(case: Case) -> Iterator[str]:
    t = tensors(case)
    both = t["values"], t["mask"]
    got = {
        "masked_sum": masked.masked_sum(*both),
        "masked_mean": masked.masked_mean(*both),
        "masked_mean_axis1": masked.masked_mean(*both, dim=1),
        "masked_var": masked.masked_variance(*both),
        "masked_whiten": masked.masked_whiten(*both),
        "masked_whiten_noshift": masked.masked_whiten(*both, shift_mean=False),
    }
    yield from named_differences(got, case["expected"], case["params"]["dtype"])


def check_kl(case: Case) -> Iterator[str]:
    t = tensors(case)
    for kind, recorded in case["expected"].items():
        got = kl_estimate(t["log_prob"].detach(), t["ref_log_prob"], kind)
        yield from number_differences(kind, got, recorded, case["params"]["dtype"])


def check_logprobs(case: Case) -> Iterator[str]:
    labels = torch.tensor(case["inputs"]["labels"])
    logprobs, entropy = token_logprobs(
        tensors(case)["logits"].flatten(0, 1),
        labels.flatten(),
        temperature=case["params"]["temperature"],
        with_entropy=True,
    )
    assert entropy is not None
    got = {
        "logprobs_naive": logprobs.reshape(labels.shape),
        "logprobs_v2": logprobs.reshape(labels.shape),
        "entropy": entropy.reshape(labels.shape),
    }
    yield from named_differences(got, case["expected"], case["params"]["dtype"])


def check_sil(case: Case) -> Iterator[str]:
    """The replay loss as a whole: baseline, kept rows, loss, its gradient and its weight."""
    params, expected, t = case["params"], case["expected"], tensors(case)
    weight = params["replay_loss_coef"] * cosine_warmup(
        params["global_step"], params["max_replay_loss_steps"]
    )
    got = sil_loss(
        t["log_prob"],
        t["old_log_prob"],
        t["mask"],
        t["rewards"],
        np.array(case["inputs"]["group_mean_history"], np.float64),
        _clip(params),
        aggregation=params["agg"],
        mini_batch_rows=params["mini_batch_size"],
        weight=weight,
        permutation=_permutation(case),
    )
    yield from value_differences("keep", got.keep.tolist(), expected["keep"])
    (gradient,) = torch.autograd.grad(got.unscaled.loss, t["log_prob"])
    values = {
        "weight": weight,
        "p50": got.baseline,
        "advantages": got.advantages,
        "pg_loss": got.unscaled.loss.item(),
        "pg_clipfrac": got.unscaled.clip_fraction.item(),
        "ppo_kl": got.unscaled.kl.item(),
        "scaled_loss": got.scaled.item(),
        "grad_log_prob_kept_unscaled": gradient[got.keep],
    }
    recorded = {name: expected[name] for name in values}
    yield from named_differences(values, recorded, params["dtype"])
    if gradient[~got.keep].any():
        yield "grad_log_prob: got a gradient on a row that is not kept, recorded none"


CHECKS: dict[str, Check] = {
    "policy_loss_vanilla": check_vanilla,
    "policy_loss_clip_cov": check_clip_cov,
    "policy_loss_kl_cov": check_kl_cov,
    "policy_loss_gpg": check_gpg,
    "agg_loss": check_aggregation,
    "masked_ops": check_masked_statistics,
    "kl_penalty": check_kl,
    "logprob_entropy": check_logprobs,
    "sil_composite_loss": check_sil,
}
