"""The policy loss over packed tokens: a plain sum of token weight * surrogate, and regularizers.

    loss = sum(token_weight * surrogate)                              ``surrogates``
         + kl_coef * sum(regularizer_weight * KL(logprob, ref_logprob))          ``kl``
         - entropy_coef * sum(regularizer_weight * entropy)

All tensors have shape ``[T]``, the packed tokens of one micro-batch. Normalisation is inside the
weights (``algorithms.aggregation``), so losses, gradients and metric sums of micro-batches and
ranks just add up. New and replayed tokens of one micro-batch may have surrogates of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_spear.algorithms.kl import kl_estimate
from megatron_spear.algorithms.surrogates import Surrogate, SurrogateBatch, make_surrogate
from megatron_spear.config.losses import LossSection
from megatron_spear.config.method import AlgorithmSection

MetricSums = dict[str, Tensor]
_ORIGINS = (("policy", 0), ("replay", 1))


class LossBatch(SurrogateBatch, Protocol):
    """What a loss reads of a packed batch (``data.packing.TrainBatch``); tensors are ``[T]``."""

    @property
    def token_weight(self) -> Tensor:
        """Final loss weights, 0 on tokens that are not trained."""
        ...

    @property
    def origin(self) -> Tensor:
        """0 for on-policy tokens, 1 for replayed ones."""
        ...

    @property
    def regularizer_weight(self) -> Tensor:
        """Weights of KL and entropy, 0 on tokens without them."""
        ...

    @property
    def ref_logprobs(self) -> Tensor:
        """Log-probs of the reference policy; read where the KL has a weight."""
        ...


class TokenLoss(Protocol):
    """A loss the policy's training step can run: picklable, no state.

    ``temperature`` divides the logits before the log-softmax; ``needs_entropy`` asks for the
    entropy, ``entropy_grad`` for one that carries a gradient. The sums always carry the same names,
    so that ranks can add them by position.
    """

    @property
    def temperature(self) -> float:
        """Temperature of the log-probs."""
        ...

    @property
    def needs_entropy(self) -> bool:
        """Whether ``entropy`` must be given."""
        ...

    @property
    def entropy_grad(self) -> bool:
        """Whether the entropy is part of the loss."""
        ...

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: LossBatch
    ) -> tuple[Tensor, MetricSums]:
        """(scalar loss, metric sums) of one micro-batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Surrogates of new and replayed tokens, KL and entropy bonus of the new ones."""

    on_policy: Surrogate
    replay: Surrogate
    kl_coef: float = 0.0
    kl_estimator: str = "k2"
    entropy_coef: float = 0.0
    temperature: float = 1.0
    needs_entropy: bool = True

    @classmethod
    def from_sections(
        cls, algorithm: AlgorithmSection, replay: LossSection, *, temperature: float
    ) -> "PolicyLoss":
        """The loss of the ``algorithm`` section and of ``replay.loss`` at the rollout's sampling
        temperature."""
        official = algorithm.compat == "official"
        return cls(
            on_policy=make_surrogate(algorithm.loss, official=official),
            replay=make_surrogate(replay, official=official),
            kl_coef=algorithm.kl.coef,
            kl_estimator=algorithm.kl.estimator,
            entropy_coef=algorithm.entropy_coef,
            temperature=temperature,
        )

    @property
    def entropy_grad(self) -> bool:
        """Whether there is an entropy bonus."""
        return self.entropy_coef != 0.0

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: LossBatch
    ) -> tuple[Tensor, MetricSums]:
        """Loss (scalar) and metric sums; logprobs ``[T]`` carry the gradient.

        Example: surrogate -2.56 at weight 0.1 costs -0.256; an entropy of 0.5 at regularizer weight
        0.1 and entropy_coef 0.01 takes 0.0005 off.
        """
        mask = batch.token_weight != 0
        terms = self.on_policy(logprobs, batch, mask)
        if self.replay != self.on_policy:
            replayed = batch.origin == 1
            others = self.replay(logprobs, batch, mask)
            terms = {k: torch.where(replayed, others[k], own) for k, own in terms.items()}
        terms["loss"] = batch.token_weight * terms.pop("surrogate")
        if entropy is not None:
            terms["entropy"] = entropy
        added, sums = self._regularizers(logprobs, entropy, batch, terms)
        return terms["loss"].sum() + added, sums | _sums_by_origin(terms, mask, batch.origin)

    def _regularizers(
        self, logprobs: Tensor, entropy: Tensor | None, batch: LossBatch, terms: dict[str, Tensor]
    ) -> tuple[Tensor, MetricSums]:
        """(scalar to add, its parts as sums); the KL joins the measured ``terms``."""
        weight = batch.regularizer_weight
        total, sums = logprobs.new_zeros(()), {}
        zero = torch.zeros_like(logprobs)
        if self.kl_coef:
            regularized = weight != 0
            kl = kl_estimate(
                torch.where(regularized, logprobs, zero),
                torch.where(regularized, batch.ref_logprobs, zero),
                self.kl_estimator,
            )
            terms["ref_kl"] = kl
            part = self.kl_coef * (weight * kl).sum()
            total, sums["policy/sum_kl_loss"] = total + part, part.detach().double()
        if self.entropy_grad:
            assert entropy is not None, "the training step gives what needs_entropy asks for"
            part = -self.entropy_coef * (weight * torch.where(weight != 0, entropy, zero)).sum()
            total, sums["policy/sum_entropy_loss"] = total + part, part.detach().double()
        return total, sums


@dataclass(frozen=True, kw_only=True)
class NllLoss:
    """Negative log-likelihood for supervised training: sum of token weight * -logprob."""

    temperature: float = 1.0
    needs_entropy: bool = False
    entropy_grad: bool = False

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
    "sum_ref_kl": "ref_kl",
    "sum_entropy": "entropy",
    "sum_nll": "nll",
}
_LOSSES = {"sum_kl_loss": "loss/kl", "sum_entropy_loss": "loss/entropy"}


def finish_metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """Named metrics of one optimizer step from the sums added over its micro-batches and ranks.

    ``loss/policy`` and ``loss/replay`` are the two surrogate parts of the summed loss (the second
    includes gamma), ``loss/kl`` and ``loss/entropy`` the regularizers with their coefficients,
    ``loss/sft`` the supervised one. Means are over trained tokens: ``policy/clip_fraction``,
    ``policy/ratio_mean``, ``policy/kl`` (mean of old - new log-prob),
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
        elif term in _LOSSES:
            result[_LOSSES[term]] = float(value)
        elif term == "sum_loss":
            result[f"loss/{prefix}"] = float(value)
        else:
            result[f"{prefix}/{_MEANS[term]}"] = float(value) / num_tokens
    return result
