"""The plainest loss, for tests of the policy."""

from dataclasses import dataclass

from torch import Tensor

from megatron_spear.data.packing import TrainBatch


@dataclass
class WeightedNll:
    """Plain sum of token_weight * -log p; picklable, so that ranks can be handed it."""

    temperature: float = 1.0
    needs_entropy: bool = False
    entropy_grad: bool = False
    factor: float = 1.0

    def __call__(
        self, logprobs: Tensor, entropy: Tensor | None, batch: TrainBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -self.factor * (batch.token_weight * logprobs).sum()
        return loss, {"tokens": (batch.token_weight > 0).sum()}
