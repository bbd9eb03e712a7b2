"""The clipped policy loss over packed tokens: a plain sum of token weight * surrogate.

    log_ratio = clamp(logprobs - old_logprobs, -20, 20)          ratio = exp(log_ratio)
    surrogate = max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))
    surrogate = min(surrogate, -A * dual_clip)                   where A < 0
    loss      = sum(token_weight * surrogate)

All tensors have shape ``[T]``, the packed tokens of one micro-batch. Normalisation is inside the
token weights (``algorithms.aggregation``), so losses, gradients and metric sums of micro-batches
and ranks just add up. PPO: arXiv 1707.06347; clip-higher: DAPO, arXiv 2503.14476; dual clip: arXiv
1912.09729.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_spear.algorithms.covariance import MAX_LOG_RATIO
from megatron_spear.config.method import AlgorithmSection

MetricSums = dict[str, Tensor]
_ORIGINS = (("policy", 0), ("replay", 1))


class LossBatch(Protocol):
    """What a loss reads of a packed batch (``data.packing.TrainBatch``); tensors are ``[T]``."""

    @property
    def old_logprobs(self) -> Tensor:
        """Log-probs before the update: the ratio's denominator."""
        ...

    @property
    def advantages(self) -> Tensor:
        """Advantages, 0 on tokens that are not trained."""
        ...

    @property
    def token_weight(self) -> Tensor:
        """Final loss weights, 0 on tokens that are not trained."""
        ...

    @property
    def origin(self) -> Tensor:
        """0 for on-policy tokens, 1 for replayed ones."""
        ...


class TokenLoss(Protocol):
    """A loss the policy's training step can run: picklable, no state.

    ``temperature`` divides the logits before the log-softmax; ``needs_entropy`` asks for the
    entropy. The sums always carry the same names, so that ranks can add them by position.
    """

    @property
    def temperature(self) -> float:
        """Temperature of the log-probs."""
        ...

    @property
    def needs_entropy(self) -> bool:
        """Whether ``entropy`` must be given."""
        ...

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: LossBatch
    ) -> tuple[Tensor, MetricSums]:
        """(scalar loss, metric sums) of one micro-batch."""
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


@dataclass(frozen=True, kw_only=True)
class ClippedLoss:
    """PPO's clipped surrogate with separate bounds and a dual clip (None = no dual clip)."""

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    temperature: float = 1.0
    needs_entropy: bool = True

    @classmethod
    def from_section(cls, section: AlgorithmSection, *, temperature: float) -> "ClippedLoss":
        """The loss of the ``algorithm`` section at the rollout's sampling temperature."""
        return cls(
            clip_low=section.clip_low,
            clip_high=section.clip_high,
            dual_clip=section.dual_clip,
            temperature=temperature,
        )

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: LossBatch
    ) -> tuple[Tensor, MetricSums]:
        """Loss (scalar) and metric sums; logprobs ``[T]`` carry the gradient.

        Example: ratio 1.5, advantage 2, weight 0.1 with clip_high 0.28 costs 0.1 * -2 * 1.28 =
        -0.256 and has no gradient.
        """
        mask = batch.token_weight != 0
        raw, log_ratio = log_ratios(logprobs, batch.old_logprobs, mask)
        ratio, advantages = log_ratio.exp(), batch.advantages
        surrogate, clipped, dual_clipped = clipped_surrogate(
            ratio, advantages, self.clip_low, self.clip_high, self.dual_clip
        )
        weighted = batch.token_weight * surrogate
        no_gradient = clipped | dual_clipped | (advantages == 0) | (raw.abs() > MAX_LOG_RATIO)
        terms = {
            "loss": weighted,
            "ratio": ratio,
            "kl": -log_ratio,
            "clipped": clipped,
            "dual_clipped": dual_clipped,
            "zero_gradient": no_gradient,
        }
        return loss_and_sums(terms, entropy, mask, batch.origin)


@dataclass(frozen=True, kw_only=True)
class NllLoss:
    """Negative log-likelihood for supervised training: sum of token weight * -logprob."""

    temperature: float = 1.0
    needs_entropy: bool = False

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: LossBatch
    ) -> tuple[Tensor, MetricSums]:
        """Loss (scalar) and metric sums; logprobs ``[T]`` carry the gradient."""
        mask = batch.token_weight != 0
        nll = torch.where(mask, -logprobs, torch.zeros_like(logprobs))
        weighted = batch.token_weight * nll
        sums = {
            "sft/num_tokens": mask.sum().double(),
            "sft/sum_loss": weighted.detach().double().sum(),
            "sft/sum_nll": nll.detach().double().sum(),
        }
        return weighted.sum(), sums


def loss_and_sums(
    terms: Mapping[str, Tensor], entropy: Tensor | None, mask: Tensor, origin: Tensor
) -> tuple[Tensor, MetricSums]:
    """(sum of the ``loss`` term, metric sums of all terms and of the entropy where there is one)"""
    measured = terms if entropy is None else {**terms, "entropy": entropy}
    return terms["loss"].sum(), _sums_by_origin(measured, mask, origin)


def _sums_by_origin(terms: Mapping[str, Tensor], mask: Tensor, origin: Tensor) -> MetricSums:
    """``<origin>/num_tokens`` and ``<origin>/sum_<term>`` over the trained tokens, float64."""
    sums: MetricSums = {}
    for prefix, code in _ORIGINS:
        chosen = mask & (origin == code)
        sums[f"{prefix}/num_tokens"] = chosen.sum().double()
        for name, term in terms.items():
            kept = torch.where(chosen, term.detach().double(), 0.0)
            sums[f"{prefix}/sum_{name}"] = kept.sum()
    return sums


_MEANS = {
    "sum_ratio": "ratio_mean",
    "sum_kl": "kl",
    "sum_clipped": "clip_fraction",
    "sum_dual_clipped": "dual_clip_fraction",
    "sum_zero_gradient": "zero_gradient_fraction",
    "sum_kl_selected": "kl_selected_fraction",
    "sum_entropy": "entropy",
    "sum_nll": "nll",
}


def finish_metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """Named metrics of one optimizer step from the sums added over its micro-batches and ranks.

    ``loss/policy`` and ``loss/replay`` are the two parts of the summed loss (the second includes
    gamma), ``loss/sft`` the supervised one. Means are over trained tokens:
    ``policy/clip_fraction``, ``policy/ratio_mean``, ``policy/kl`` (mean of old - new log-prob),
    ``replay/zero_gradient_fraction`` and so on; a part without tokens is left out. Values may be
    tensors or floats.

    Example: ``{"policy/num_tokens": 4, "policy/sum_clipped": 1, "policy/sum_loss": 0.3}`` gives
    ``{"policy/num_tokens": 4, "loss/policy": 0.3, "policy/clip_fraction": 0.25}``.
    """
    result: dict[str, float] = {}
    for name, value in sums.items():
        prefix, _, term = name.partition("/")
        num_tokens = float(sums[f"{prefix}/num_tokens"])
        if num_tokens == 0:
            continue
        if term == "num_tokens":
            result[name] = num_tokens
        elif term == "sum_loss":
            result[f"loss/{prefix}"] = float(value)
        else:
            result[f"{prefix}/{_MEANS[term]}"] = float(value) / num_tokens
    return result
