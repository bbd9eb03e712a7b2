"""What a transport asks of the engines' servers during a weight update, as protocols.

    for each update:   pause -> [begin -> receive ... -> end(version)] of each server -> resume
    a server where any of it failed is taken out, and admitted again after a whole update

``rollout.engines`` implements both for SGLang and vLLM. Calls return futures, since a server
answers a request to receive only when the tensors have arrived: the trainer sends them in between.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor as both sides must know it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return int(torch.Size(self.shape).numel() * self.dtype.itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAddress:
    """Where processes meet for a process group: the trainer's rank 0 listens at ``host:port``."""

    host: str
    port: int
    name: str
    backend: str
    """``gloo`` or ``nccl``."""
    world_size: int


class UpdateServer(Protocol):
    """One engine server. Every future ends within the server's deadline and raises EngineError
    where the server refused, died or was late."""

    name: str
    """Its URL."""
    num_ranks: int
    """Tensor-parallel ranks, each of which receives."""

    @property
    def serving(self) -> bool:
        """False until it is admitted, and from the moment it is taken out: it may be a new process,
        which is in no group and may hold other parameters."""
        ...

    def parameter_names(self) -> "Future[frozenset[str] | None]":
        """The names under which the server holds its parameters (fused ones as it fuses them);
        None where it does not say."""
        ...

    def begin_update(self) -> "Future[None]":
        """Open an update; weights are received only between this and ``end_update``. One that was
        left open by an update that failed is given up."""
        ...

    def end_update(self, policy_version: int) -> "Future[None]":
        """Close the update: the caches are dropped and answers carry ``policy_version``."""
        ...

    def load_folder(self, folder: str, policy_version: int) -> "Future[None]":
        """Take all weights from a Hugging Face folder that the server can read."""
        ...

    def join_group(self, group: GroupAddress, first_rank: int) -> "Future[None]":
        """The server's ranks join the group as ``first_rank``, ``first_rank + 1``, ...; ends once
        all of the group are there."""
        ...

    def leave_group(self, name: str) -> "Future[None]":
        """Forget a group."""
        ...

    def receive_broadcast(
        self, tensors: Sequence[TensorSpec], group: str, policy_version: int
    ) -> "Future[None]":
        """Receive Hugging Face tensors from rank 0 of the group: one broadcast of all their bytes,
        uint8, in this order without padding."""
        ...

    def receive_payloads(
        self, payloads: Sequence[bytes], load_format: str | None, policy_version: int
    ) -> "Future[None]":
        """Hand rank i pickled ``[(name, tensor)]`` ``payloads[i]`` (SGLang's
        update_weights_from_tensor); ``load_format`` names the loader, None = Hugging Face names."""
        ...


class UpdateServers(Protocol):
    """All servers of a run; methods are for the thread that trains."""

    def reachable(self) -> Sequence[UpdateServer]:
        """Servers to update: those that serve, and those taken out that answer again."""
        ...

    def pause(self) -> None:
        """Stop generating everywhere (the mode is the rollout's setting); a server that cannot be
        paused is taken out."""
        ...

    def resume(self) -> None:
        """Go on generating."""
        ...

    def take_out(self, server: UpdateServer, why: str) -> None:
        """Send a server no requests until it is admitted again; what it was generating is drawn
        anew elsewhere, since it may go on with a mixture of weights."""
        ...

    def admit(self, server: UpdateServer, policy_version: int) -> None:
        """The server holds all of ``policy_version``, which is above all versions before."""
        ...
