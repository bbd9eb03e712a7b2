"""NCCL's groups with a server that joins as SGLang does: it answers at once and makes the
communicator in its first broadcast, which all ranks have to be in."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.background import nothing_to_do
from megatron_spear.errors import EngineError
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.update import Update

DEADLINE_S = 1.0


class Nccl:
    """What of NCCL matters here, rank 0's end: the making of a communicator waits for the server's
    ranks, whatever the timeout. ``made`` says that they are in theirs."""

    def __init__(self) -> None:
        self.made, self.left = threading.Event(), 0

    def join(self, *, device: torch.device | None = None, **about: Any) -> Any:
        if device is not None:  # torch connects then, and waits
            self._make_communicator()
        return self

    def broadcast(self, data: torch.Tensor, *, src: int, group: Any, async_op: bool) -> Any:
        self._make_communicator()
        return self

    def _make_communicator(self) -> None:
        if not self.made.wait(30.0):
            raise RuntimeError("the test is over")

    def leave(self, group: Any) -> None:
        self.left += 1

    def abort(self) -> None: ...
    def is_completed(self) -> bool:
        return True

    def wait(self) -> None: ...


class Server:
    """``answer`` to the request to receive: taken, refused or never."""

    name, num_ranks, serving = "engine", 1, False

    def __init__(self, nccl: Nccl, answer: str) -> None:
        self._nccl, self._answer = nccl, answer

    def join_group(self, group: Any, first_rank: int) -> Any:
        return nothing_to_do()

    def receive_broadcast(self, *args: Any) -> Any:
        future: Future[None] = Future()
        if self._answer == "taken":
            self._nccl.made.set()
            future.set_result(None)
        elif self._answer == "refused":
            future.set_exception(EngineError("it has no such group"))
        return future

    def end_update(self, policy_version: int) -> Any:
        return nothing_to_do()

    def begin_update(self) -> Any:
        return nothing_to_do()

    def leave_group(self, name: str) -> Any:
        return nothing_to_do()


class Servers:
    """One server; ``out`` says why it was taken out."""

    def __init__(self, server: Server) -> None:
        self._server, self.out = server, ""

    def reachable(self) -> list[Any]:
        return [self._server]

    def take_out(self, server: Any, why: str) -> None:
        self.out = why

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def admit(self, server: Any, policy_version: int) -> None: ...


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nccl]:
    made = Nccl()
    monkeypatch.setattr(peer_groups, "join", made.join)
    monkeypatch.setattr(peer_groups, "leave", made.leave)
    monkeypatch.setattr(dist, "broadcast", made.broadcast)
    yield made
    made.made.set()


def _deliver(nccl: Nccl, answer: str) -> tuple[int, str, float]:
    """Bytes sent, why the server was taken out, seconds."""
    delivery = Broadcast(
        host="127.0.0.1",
        backend="nccl",
        bucket_bytes=100,
        deadline_s=DEADLINE_S,
        device=torch.device("cpu"),
    )
    servers, sent = Servers(Server(nccl, answer)), 0
    update = Update(servers, 1, DEADLINE_S)
    started = time.monotonic()
    try:
        sent = delivery.deliver(update, iter([("weight", torch.zeros(3))]))
    except EngineError as error:
        assert "no engine server has taken policy version 1" in str(error)
    seconds = time.monotonic() - started
    nccl.made.set()
    delivery.close()
    return sent, servers.out, seconds


def test_the_group_is_made_in_the_first_broadcast(nccl: Nccl) -> None:
    assert _deliver(nccl, "taken")[:2] == (12, "")
    assert nccl.left == 1


def test_a_server_that_refuses_the_first_broadcast_is_not_waited_for(nccl: Nccl) -> None:
    sent, why, seconds = _deliver(nccl, "refused")
    assert (sent, why) == (0, "weights: it has no such group") and seconds < DEADLINE_S
    assert nccl.left == 1, "it is left once the communicator is made"


def test_a_server_that_never_comes_to_the_first_broadcast_costs_the_deadline(nccl: Nccl) -> None:
    sent, why, seconds = _deliver(nccl, "never")
    assert sent == 0 and "it did not take a bucket within 1 s" in why
    assert DEADLINE_S <= seconds < DEADLINE_S + 1.0
