"""What a token costs before its weight: the surrogates of the clipped, KL-Cov and GPG losses.

    log_ratio = clamp(logprobs - old_logprobs, -20, 20)          ratio = exp(log_ratio)

    Clipped  max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)),
             at most -A * dual_clip where A < 0
    KL-Cov   -A * ratio + coef * abs(log_ratio) * kl_selected
    GPG      -A * logprob

All tensors have shape ``[T]``, the packed tokens of one micro-batch. PPO: arXiv 1707.06347;
clip-higher: DAPO, arXiv 2503.14476; dual clip: arXiv 1912.09729; KL-Cov: arXiv 2505.22617; GPG:
arXiv 2504.02546. Clip-Cov is Clipped with dropped tokens, whose weight is 0 (``covariance``).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_spear.config.losses import (
    ClipCovLossSection,
    ClippedLossSection,
    GpgLossSection,
    KlCovLossSection,
    LossSection,
)

MAX_LOG_RATIO = 20.0
"""Log ratios are clamped to +- this before they are exponentiated."""

Terms = dict[str, Tensor]
"""``[T]`` each: ``surrogate`` (carries the gradient), and what is measured: ``ratio``, ``kl``,
``clipped``, ``dual_clipped``, ``kl_selected``, ``zero_gradient``."""


class SurrogateBatch(Protocol):
    """What a surrogate reads of a packed batch; tensors are ``[T]``."""

    @property
    def old_logprobs(self) -> Tensor:
        """Log-probs before the update: the ratio's denominator."""
        ...

    @property
    def advantages(self) -> Tensor:
        """Advantages, 0 on tokens that are not trained."""
        ...

    @property
    def kl_selected(self) -> Tensor:
        """bool: chosen over the whole mini-batch by ``covariance.kl_selected_tokens``."""
        ...


class Surrogate(Protocol):
    """A token's cost; picklable, without state, comparable."""

    def __call__(self, logprobs: Tensor, batch: SurrogateBatch, mask: Tensor) -> Terms:
        """The terms; ``mask`` is True on the trained tokens, all else may hold anything."""
        ...


def log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``logprobs - old_logprobs`` (0 outside ``mask``) as it is, and clamped to +-20.

    Untrained tokens are cut off here, before any exp, so that nothing they hold can become NaN
    times 0.
    """
    raw = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    return raw, raw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(surrogate, bool: clipped, bool: dual-clipped), each of the shape of ``ratio``.

    Example: ratio 1.5, advantage 2, clip_high 0.28: surrogate -2.56, clipped, not dual-clipped.
    """
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.maximum(free, bounded)
    clipped = bounded > free
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (bound < surrogate)
        surrogate = torch.where(advantages < 0, torch.minimum(surrogate, bound), surrogate)
    return surrogate, clipped, dual_clipped


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
class Clipped:
    """PPO's clipped surrogate with separate bounds and a dual clip (None = no dual clip).

    Without ``clamp`` the log ratio is used as it is, however large (the official clip_cov).
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    clamp: bool = True

    def __call__(self, logprobs: Tensor, batch: SurrogateBatch, mask: Tensor) -> Terms:
        """The terms.

        Example: ratio 1.5, advantage 2 with clip_high 0.28 costs -2 * 1.28 = -2.56 and has no
        gradient.
        """
        raw, log_ratio = log_ratios(logprobs, batch.old_logprobs, mask)
        log_ratio = log_ratio if self.clamp else raw
        ratio, advantages = log_ratio.exp(), batch.advantages
        surrogate, clipped, dual_clipped = clipped_surrogate(
            ratio, advantages, self.clip_low, self.clip_high, self.dual_clip
        )
        return {
            "surrogate": surrogate,
            "ratio": ratio,
            "kl": -log_ratio,
            "clipped": clipped,
            "dual_clipped": dual_clipped,
            "kl_selected": torch.zeros_like(clipped),
            "zero_gradient": clipped | dual_clipped | (advantages == 0) | (log_ratio != raw),
        }


@dataclass(frozen=True, kw_only=True)
class KlCov:
    """Unclipped surrogate; tokens of highest covariance pay for moving away from the old policy."""

    coef: float

    def __call__(self, logprobs: Tensor, batch: SurrogateBatch, mask: Tensor) -> Terms:
        """The terms.

        Example: ratio 1.5, advantage 2 costs -3; a selected token with coef 0.1 costs -3 +
        0.1 * ln 1.5 = -2.9595.
        """
        raw, log_ratio = log_ratios(logprobs, batch.old_logprobs, mask)
        selected, advantages = batch.kl_selected, batch.advantages
        ratio = log_ratio.detach().exp()
        slope = -advantages * ratio + self.coef * selected * log_ratio.detach().sign()
        none = torch.zeros_like(selected)
        return {
            "surrogate": kl_cov_surrogate(log_ratio, advantages, selected, self.coef),
            "ratio": ratio,
            "kl": -log_ratio,
            "clipped": none,
            "dual_clipped": none,
            "kl_selected": selected,
            "zero_gradient": (slope == 0) | (log_ratio.detach() != raw),
        }


@dataclass(frozen=True, kw_only=True)
class Gpg:
    """Plain policy gradient: the old log-probs are only measured against, never divided by."""

    def __call__(self, logprobs: Tensor, batch: SurrogateBatch, mask: Tensor) -> Terms:
        """The terms. Example: logprob -2, advantage 0.5 costs 1; its gradient is -0.5."""
        trained = torch.where(mask, logprobs, torch.zeros_like(logprobs))
        _, log_ratio = log_ratios(logprobs.detach(), batch.old_logprobs, mask)
        none = torch.zeros_like(mask)
        return {
            "surrogate": gpg_surrogate(trained, batch.advantages),
            "ratio": log_ratio.exp(),
            "kl": -log_ratio,
            "clipped": none,
            "dual_clipped": none,
            "kl_selected": none,
            "zero_gradient": batch.advantages == 0,
        }


def make_surrogate(section: LossSection, *, official: bool = False) -> Surrogate:
    """The surrogate a loss section asks for; the ``official`` clip_cov has no clamp and no dual
    clip (defect 13)."""
    match section:
        case ClipCovLossSection() if official:
            return Clipped(clip_low=section.clip_low, clip_high=section.clip_high, clamp=False)
        case ClippedLossSection() | ClipCovLossSection():
            return Clipped(
                clip_low=section.clip_low,
                clip_high=section.clip_high,
                dual_clip=section.dual_clip,
            )
        case KlCovLossSection():
            return KlCov(coef=section.coef)
        case GpgLossSection():
            return Gpg()
