"""The fields of a packed batch that token losses read, for tests with numbers of their own."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class LossFields:
    """Tensors ``[T]`` as ``algorithms.policy_loss.LossBatch`` names them.

    ``kl_selected`` is read by KL-Cov only; None selects no token.
    """

    old_logprobs: Tensor
    advantages: Tensor
    token_weight: Tensor
    origin: Tensor
    kl_selected: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kl_selected is None:
            self.kl_selected = torch.zeros_like(self.advantages, dtype=torch.bool)

    def part(self, chosen: slice) -> "LossFields":
        """The same fields of some of the tokens."""
        return LossFields(*(getattr(self, field.name)[chosen] for field in fields(self)))
