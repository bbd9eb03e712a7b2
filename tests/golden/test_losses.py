"""The default KL-covariance and GPG losses against numbers computed by the official code.

They are held to the official numbers where a choice of token weights makes the two equal; the
official losses themselves are in ``test_vectors``.
"""

from typing import Any

import numpy as np
import pytest
import torch
from golden_vectors import assert_match, cases
from torch import Tensor

from megatron_spear.algorithms.covariance import kl_selected_tokens
from megatron_spear.algorithms.official.masked import aggregate
from megatron_spear.algorithms.surrogates import Gpg, KlCov
from megatron_spear.testing.golden.losses import tensors
from megatron_spear.testing.hand_made import make_sample
from megatron_spear.testing.loss_batch import LossFields, one_loss

Case = dict[str, Any]


def _official_weights(mask: Tensor, mode: str) -> Tensor:
    """Token weights ``[B * T]`` that make a plain sum equal the official aggregation."""
    ones = torch.ones_like(mask, requires_grad=True)
    aggregate(ones, mask, mode).backward()
    return ones.grad.flatten()


@pytest.mark.parametrize("case", cases("policy_loss_kl_cov"))
def test_kl_cov_of_the_whole_update(case: Case) -> None:
    params, expected, t = case["params"], case["expected"], tensors(case)
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
    batch = LossFields(
        old_logprobs=t["old_log_prob"].flatten(),
        advantages=t["advantages"].flatten(),
        token_weight=_official_weights(t["mask"], params["agg"]),
        origin=torch.zeros(mask.numel(), dtype=torch.long),
        kl_selected=torch.from_numpy(np.concatenate(selected)),
    )
    total, _ = one_loss(KlCov(coef=params["ppo_kl_coef"]))(t["log_prob"].flatten(), None, batch)
    total.backward()
    assert_match(total.item(), expected["pg_loss"], params["dtype"])
    assert_match(t["log_prob"].grad, expected["grad_log_prob"], params["dtype"])


@pytest.mark.parametrize("case", cases("policy_loss_gpg"))
def test_gpg(case: Case) -> None:
    params, expected, t = case["params"], case["expected"], tensors(case)
    count = t["mask"].numel()
    batch = LossFields(
        old_logprobs=torch.zeros(count),
        advantages=t["advantages"].flatten(),
        token_weight=_official_weights(t["mask"], params["agg"]),
        origin=torch.zeros(count, dtype=torch.long),
        kl_selected=torch.zeros(count, dtype=torch.bool),
    )
    total, _ = one_loss(Gpg())(t["log_prob"].flatten(), None, batch)
    total.backward()
    assert_match(total.item(), expected["pg_loss"], params["dtype"])
    assert_match(t["log_prob"].grad, expected["grad_log_prob"], params["dtype"])
