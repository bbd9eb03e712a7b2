"""The fields of a packed batch that token losses read, for tests with numbers of their own."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_spear.algorithms.policy_loss import PolicyLoss
from megatron_spear.algorithms.surrogates import Surrogate


@dataclass
class LossFields:
    """Tensors ``[T]`` as ``algorithms.policy_loss.LossBatch`` names them.

    ``kl_selected`` is read by KL-Cov only, ``regularizer_weight`` and ``ref_logprobs`` by losses
    with an entropy bonus or a KL; None is 0 everywhere.
    """

    old_logprobs: Tensor
    advantages: Tensor
    token_weight: Tensor
    origin: Tensor
    kl_selected: Tensor | None = None
    regularizer_weight: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kl_selected is None:
            self.kl_selected = torch.zeros_like(self.advantages, dtype=torch.bool)
        if self.regularizer_weight is None:
            self.regularizer_weight = torch.zeros_like(self.advantages)
        if self.ref_logprobs is None:
            self.ref_logprobs = torch.zeros_like(self.advantages)

    def part(self, chosen: slice) -> "LossFields":
        """The same fields of some of the tokens."""
        return LossFields(*(getattr(self, field.name)[chosen] for field in fields(self)))


def one_loss(surrogate: Surrogate, temperature: float = 1.0) -> PolicyLoss:
    """The loss with one surrogate for new and replayed tokens."""
    return PolicyLoss(on_policy=surrogate, replay=surrogate, temperature=temperature)
