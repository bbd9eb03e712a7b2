"""The making of a replica's group: its timeout, a making that never ends, and on which device."""

import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from megatron_spear import peer_groups
from megatron_spear.background import in_background, nothing_to_do
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import EngineError
from megatron_spear.testing.engine_shards import engine_parameters
from megatron_spear.testing.training_ranks import random_weights, rank_slices
from megatron_spear.weight_sync.layouts import TrainingLayout
from megatron_spear.weight_sync.receivers.places import locate
from megatron_spear.weight_sync.sharded.link import Deadline, Link
from megatron_spear.weight_sync.sharded.receiver import Receiver
from megatron_spear.weight_sync.sharded.records import Meeting
from megatron_spear.weight_sync.sharded.transport import Sharded

SHAPE = ModelShape(
    family="qwen3", num_layers=1, hidden_size=16, ffn_size=32, num_heads=2, num_groups=2,
    head_dim=8, vocab_size=64, norm_eps=1e-6, rope_theta=1e4, qk_norm=True,
)  # fmt: skip
LIMIT_S = 1.5
SLOW_S = 0.5


class Joins:
    """In place of ``peer_groups.join``: what it is asked for; it waits for ``made``."""

    def __init__(self) -> None:
        self.made = threading.Event()
        self.asked: list[dict[str, Any]] = []
        self.left: list[Any] = []

    def join(self, **about: Any) -> str:
        self.asked.append(about)
        self.made.wait(30.0)
        return f"group of rank {about['rank']}"


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Joins]:
    made = Joins()
    monkeypatch.setattr(peer_groups, "join", made.join)
    monkeypatch.setattr(peer_groups, "leave", made.left.append)
    yield made
    made.made.set()


class Server:
    """A server of one rank that receives in a thread of this process; slow to begin."""

    name, num_ranks, serving = "engine", 1, False

    def __init__(self) -> None:
        self.told: Future[str] = Future()

    def begin_update(self) -> Any:
        return in_background(lambda: time.sleep(SLOW_S), "begin")

    def receive_payloads(self, payloads: Any, load_format: str, policy_version: int) -> Any:
        ((_, message),) = pickle.loads(payloads[0])
        held = engine_parameters(random_weights(SHAPE), SHAPE, rank=0, size=1)
        update = Receiver().update
        self.told = in_background(lambda: update([message], lambda t: locate(t, held)), "engine")
        return nothing_to_do()


class Servers:
    """The one server; ``out`` says why it was taken out."""

    def __init__(self) -> None:
        self.server, self.out = Server(), ""

    def reachable(self) -> list[Any]:
        return [self.server]

    def take_out(self, server: Any, why: str) -> None:
        self.out = why

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Source:
    """All weights on one rank."""

    def local_slices(self) -> Any:
        return rank_slices(random_weights(SHAPE), SHAPE, TrainingLayout(), 0)


def _publish(servers: Servers, device: str) -> float:
    """Seconds until it is told that no server has the weights."""
    transport = Sharded(
        source=Source(),
        ranks=Alone(torch.device(device)),
        servers=servers,
        model=SHAPE,
        training=TrainingLayout(),
        host="127.0.0.1",
        bucket_bytes=4096,
        precision="model",
        deadline_s=LIMIT_S,
    )
    started = time.monotonic()
    with pytest.raises(EngineError, match="no engine server has taken policy version 1"):
        transport.publish(1)
    return time.monotonic() - started


class Alone:
    """The one training rank."""

    rank, world_size, control = 0, 1, None

    def __init__(self, device: torch.device) -> None:
        self.device = device


def test_a_group_that_is_never_made_costs_the_deadline(joins: Joins) -> None:
    servers = Servers()
    assert LIMIT_S <= _publish(servers, "cpu") < LIMIT_S + 1.0
    assert "training rank 0: " in servers.out and "not all ranks joined" in servers.out
    assert "not all ranks joined" in servers.server.told.result(5.0), "nor does the engine wait"
    timeouts = {about["rank"]: about["timeout_s"] for about in joins.asked}
    assert timeouts == {0: 2 * LIMIT_S, 1: 2 * LIMIT_S}, "not what the slow server left of it"
    joins.made.set()
    patience = time.monotonic() + 5.0
    while len(joins.left) < 2:
        assert time.monotonic() < patience, "made too late, it is left"
        time.sleep(0.01)


def test_an_engine_rank_that_gives_up_is_not_waited_for(joins: Joins) -> None:
    store = peer_groups.listen("127.0.0.1", timeout_s=5.0)
    meeting = Meeting(
        host="127.0.0.1", port=store.port, name="x", backend="nccl", senders=(0,),
        num_receivers=2, timeout_s=60.0,
    )  # fmt: skip
    link = Link(meeting, 0, store)
    link.say("3/done/0", "")  # it has all it gets
    threading.Timer(0.2, lambda: link.say("3/done/1", "out of memory")).start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 of the engine did not join: out of memory"):
        link.join(Deadline(30.0), torch.device("cpu"), 3)
    assert 0.1 < time.monotonic() - started < 5.0


def test_threads_use_their_ranks_gpu(joins: Joins, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's is the first one of the machine."""
    used: set[tuple[str, torch.device]] = set()
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda d: used.add((threading.current_thread().name[:7], d))
    )
    _publish(Servers(), "cuda:3")
    gpu = torch.device("cuda", 3)
    assert {("weights", gpu), ("join of", gpu)} <= used
    assert {about["device"] for about in joins.asked if about["rank"] == 0} == {gpu}
