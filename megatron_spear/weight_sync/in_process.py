"""Weights from the policy into an engine of the same process, streamed by Hugging Face name."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_spear.weight_sync.export import Export, TrainingRanks
from megatron_spear.weight_sync.transport import WeightSource


class WeightReceiver(Protocol):
    """What takes weights."""

    def load_weights(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int
    ) -> None:
        """Take a full set and its version."""
        ...


class InProcess:
    """A ``Transport`` to one engine of this process; ``receiver`` is None on other ranks.

    ``pause`` and ``resume`` keep the engine from stepping meanwhile. One tensor is held at a time.
    ``control`` is a gloo group of all training ranks, None where there is one.
    """

    def __init__(
        self,
        *,
        source: WeightSource,
        receiver: WeightReceiver | None,
        control: dist.ProcessGroup | None = None,
        pause: Callable[[], object] = lambda: None,
        resume: Callable[[], object] = lambda: None,
    ) -> None:
        self._ranks = TrainingRanks(source, control)
        self._receiver = receiver
        self._pause = pause
        self._resume = resume

    def publish(self, policy_version: int) -> dict[str, float]:
        """Stream all weights to the receiver; see ``Transport``."""
        receiver = self._receiver
        if receiver is None:
            return self._ranks.publish(policy_version, None)
        return self._ranks.publish(policy_version, partial(self._load, receiver, policy_version))

    def close(self) -> None:
        """Nothing is held."""

    def _load(
        self, receiver: WeightReceiver, policy_version: int, export: Export
    ) -> dict[str, float]:
        sent = 0

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal sent
            for name, tensor in export:
                assert tensor is not None, "the controller has all tensors"
                sent += tensor.nbytes
                yield name, tensor

        self._pause()
        try:
            receiver.load_weights(stream(), policy_version)
        finally:
            self._resume()
        return {"weight_sync/bytes": float(sent)}
