"""Weights from the policy into an engine of the same process, streamed by Hugging Face name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_spear.weight_sync.transport import WeightSource


class WeightReceiver(Protocol):
    """What takes weights."""

    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int
    ) -> None:
        """Take a full set and its version."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class InProcess:
    """A ``Transport`` to one engine of this process; ``receiver`` is None on other ranks.

    ``pause`` and ``resume`` keep the engine from stepping meanwhile. One tensor is held at a time.
    """

    source: WeightSource
    receiver: WeightReceiver | None
    pause: Callable[[], object] = lambda: None
    resume: Callable[[], object] = lambda: None

    def publish(self, policy_version: int) -> dict[str, float]:
        """Stream all weights to the receiver; see ``Transport``."""
        sent = 0

        def stream() -> Iterable[tuple[str, torch.Tensor]]:
            nonlocal sent
            for name, tensor in self.source.export_weights():
                if tensor is not None:
                    sent += tensor.numel() * tensor.element_size()
                    yield name, tensor

        if self.receiver is None:
            for _ in stream():
                pass
        else:
            self.pause()
            try:
                self.receiver.load_weights(stream(), policy_version)
            finally:
                self.resume()
        return {"weight_sync/bytes": float(sent)}

    def close(self) -> None:
        """Nothing is held."""
