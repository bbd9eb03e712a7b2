"""Policy losses without ratio clipping, over packed tokens: KL-Cov and GPG.

As in ``policy_loss``, tensors have shape ``[T]`` and a loss is the plain sum of token weight *
surrogate, so losses, gradients and metric sums of micro-batches and ranks just add up.

    KL-Cov  surrogate = -A * ratio + coef * abs(log_ratio) * kl_selected      arXiv 2505.22617
    GPG     surrogate = -A * logprob                                          arXiv 2504.02546
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_spear.algorithms.covariance import MAX_LOG_RATIO
from megatron_spear.algorithms.policy_loss import (
    LossBatch,
    MetricSums,
    log_ratios,
    loss_and_sums,
)


class KlCovBatch(LossBatch, Protocol):
    """What ``KlCovLoss`` reads: a batch whose tokens also say whether they pay the penalty."""

    @property
    def kl_selected(self) -> Tensor:
        """bool: chosen over the whole update by ``covariance.kl_selected_tokens``."""
        ...


def kl_cov_surrogate(
    log_ratio: Tensor, advantages: Tensor, selected: Tensor, coef: float
) -> Tensor:
    """-A * ratio, plus coef * abs(log ratio) on the selected tokens."""
    penalty = torch.where(selected, coef * log_ratio.abs(), torch.zeros_like(log_ratio))
    return -advantages * log_ratio.exp() + penalty


def gpg_surrogate(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-logprob * A."""
    return -logprobs * advantages


@dataclass(frozen=True, kw_only=True)
class KlCovLoss:
    """Unclipped surrogate; tokens of highest covariance pay for moving away from the old policy."""

    coef: float
    temperature: float = 1.0
    needs_entropy: bool = True

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: KlCovBatch
    ) -> tuple[Tensor, MetricSums]:
        """Loss (scalar) and metric sums; logprobs ``[T]`` carry the gradient.

        Example: ratio 1.5, advantage 2, weight 0.1 costs 0.1 * -3 = -0.3; a selected token with
        coef 0.1 costs 0.1 * (-3 + 0.1 * ln 1.5) = -0.2959.
        """
        mask = batch.token_weight != 0
        raw, log_ratio = log_ratios(logprobs, batch.old_logprobs, mask)
        selected, advantages = batch.kl_selected, batch.advantages
        weighted = batch.token_weight * kl_cov_surrogate(log_ratio, advantages, selected, self.coef)
        ratio = log_ratio.detach().exp()
        slope = -advantages * ratio + self.coef * selected * log_ratio.detach().sign()
        terms = {
            "loss": weighted,
            "ratio": ratio,
            "kl": -log_ratio,
            "kl_selected": selected,
            "zero_gradient": (slope == 0) | (raw.abs() > MAX_LOG_RATIO),
        }
        return loss_and_sums(terms, entropy, mask, batch.origin)


@dataclass(frozen=True, kw_only=True)
class GpgLoss:
    """Plain policy gradient: the old log-probs are only measured against, never divided by."""

    temperature: float = 1.0
    needs_entropy: bool = True

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: LossBatch
    ) -> tuple[Tensor, MetricSums]:
        """Loss (scalar) and metric sums; logprobs ``[T]`` carry the gradient.

        Example: logprob -2, advantage 0.5, weight 0.1 costs 0.1 * 1 = 0.1; its gradient is -0.05.
        """
        mask = batch.token_weight != 0
        trained = torch.where(mask, logprobs, torch.zeros_like(logprobs))
        weighted = batch.token_weight * gpg_surrogate(trained, batch.advantages)
        _, log_ratio = log_ratios(logprobs.detach(), batch.old_logprobs, mask)
        terms = {
            "loss": weighted,
            "ratio": log_ratio.exp(),
            "kl": -log_ratio,
            "zero_gradient": batch.advantages == 0,
        }
        return loss_and_sums(terms, entropy, mask, batch.origin)
