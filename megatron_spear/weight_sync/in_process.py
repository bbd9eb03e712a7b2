"""Weights from the policy into an engine of the same process, streamed by Hugging Face name."""

import time
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


def publish(
    source: WeightSource, receiver: WeightReceiver | None, policy_version: int
) -> dict[str, float]:
    """Stream all weights to the receiver (None on ranks without one); every rank must call this.

    Returns ``weight_sync/bytes`` and ``time/weight_sync_s``. Holds one tensor at a time.
    """
    started = time.perf_counter()
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
    return {
        "weight_sync/bytes": float(sent),
        "time/weight_sync_s": time.perf_counter() - started,
    }
