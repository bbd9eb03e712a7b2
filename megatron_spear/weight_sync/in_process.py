"""Weights from the policy into an engine of the same process, streamed by Hugging Face name."""

from collections.abc import Iterable
from typing import Protocol

import torch


class WeightSource(Protocol):
    """What exports weights: a collective generator; names everywhere, tensors on the controller."""

    def export_weights(self) -> Iterable[tuple[str, torch.Tensor | None]]:
        """One (Hugging Face name, full tensor) at a time."""
        ...


class WeightReceiver(Protocol):
    """What takes weights."""

    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int
    ) -> None:
        """Take a full set and its version."""
        ...


def publish(source: WeightSource, receiver: WeightReceiver | None, policy_version: int) -> int:
    """Stream all weights to the receiver (None on ranks without one); every rank must call this.

    Returns the bytes sent. Holds one tensor at a time.
    """
    sent = 0

    def stream() -> Iterable[tuple[str, torch.Tensor]]:
        nonlocal sent
        for name, tensor in source.export_weights():
            if tensor is not None:
                sent += tensor.numel() * tensor.element_size()
                yield name, tensor

    if receiver is None:
        for _ in stream():
            pass
    else:
        receiver.load_weights(stream(), policy_version)
    return sent
