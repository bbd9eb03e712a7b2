"""What every way of getting weights from the policy into the engines keeps to."""

from collections.abc import Iterable
from typing import Protocol

import torch


class WeightSource(Protocol):
    """What exports weights: a collective generator; names everywhere, tensors on the controller."""

    def export_weights(self) -> Iterable[tuple[str, torch.Tensor | None]]:
        """One (Hugging Face name, full tensor) at a time."""
        ...


class Transport(Protocol):
    """One way; every training rank has one and calls it together with the others."""

    def publish(self, policy_version: int) -> dict[str, float]:
        """Bring the policy's weights into all engines as ``policy_version``, collectively.

        Returns ``weight_sync/...`` metrics: at least ``weight_sync/bytes``, what this rank sent.
        Raises EngineError on every rank if no engine has taken the whole update; an engine that has
        not, while others have, is taken out and logged. Ends within its deadline.
        """
        ...

    def close(self) -> None:
        """Leave process groups and remove what was left lying about."""
        ...
