"""One outcome on every training rank, whatever fails, and no half-done update that serves."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_spear.background import nothing_to_do
from megatron_spear.errors import CheckpointError, EngineError
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.transports import MODEL, RandomSource
from megatron_spear.weight_sync.buckets import Bucket, pack
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.update import ServerTransport, Update, send_buckets


class _Server:
    """Says yes to everything and notes it."""

    num_ranks = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self.serving = False
        self.asked_for_names = 0
        self.calls: list[Any] = []

    def parameter_names(self) -> "Future[frozenset[str]]":
        self.asked_for_names += 1
        future: Future[frozenset[str]] = Future()
        future.set_result(frozenset(Manifest.of_model(MODEL, "model").names))
        return future

    def begin_update(self) -> "Future[None]":
        self.calls.append("begin")
        return nothing_to_do()

    def end_update(self, policy_version: int) -> "Future[None]":
        self.calls.append(("end", policy_version))
        return nothing_to_do()


class _Servers:
    """Two of them, and what became of each."""

    def __init__(self) -> None:
        self.servers = [_Server("a"), _Server("b")]
        self.out: dict[str, str] = {}
        self.events: list[str] = []
        self.pause_problem: str | None = None

    def reachable(self) -> Sequence[_Server]:
        return self.servers

    def pause(self) -> None:
        self.events.append("pause")
        if self.pause_problem:
            raise EngineError(self.pause_problem)

    def resume(self) -> None:
        self.events.append("resume")

    def take_out(self, server: _Server, why: str) -> None:
        server.serving = False
        self.out[server.name] = why

    def admit(self, server: _Server, policy_version: int) -> None:
        server.serving = True
        self.events.append(f"admit {server.name} {policy_version}")


class _Buckets:
    """A delivery that drops every bucket, or raises ``error`` at the second one."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def deliver(self, update: Update, tensors: Iterator[tuple[str, torch.Tensor]]) -> int:
        sent: list[Bucket] = []

        def send(bucket: Bucket, server: _Server) -> "Future[None]":
            sent.append(bucket)
            if self.error is not None and len(sent) > 2:
                raise self.error
            return nothing_to_do()

        memory = pack(tensors, 5000, lambda size: torch.empty(size, dtype=torch.uint8))
        return send_buckets(update, memory, send)

    def close(self) -> None: ...


def _transport(
    servers: Any, delivery: Any, source: Any = None, control: Any = None
) -> ServerTransport:
    return ServerTransport(
        source=source or RandomSource(),
        manifest=Manifest.of_model(MODEL, "model"),
        servers=servers,
        delivery=delivery,
        control=control,
        deadline_s=20.0,
    )


def test_the_order_of_an_update() -> None:
    servers, source = _Servers(), RandomSource()
    transport = _transport(servers, _Buckets(), source)
    metrics = transport.publish(7)
    assert servers.events == ["pause", "admit a 7", "admit b 7", "resume"]
    assert all(server.calls == ["begin", ("end", 7)] for server in servers.servers)
    assert metrics.keys() == {
        "weight_sync/bytes",
        "weight_sync/num_servers",
        "weight_sync/num_taken_out",
        "weight_sync/pause_s",
        "weight_sync/send_s",
    }
    assert metrics["weight_sync/bytes"] == 2 * sum(t.nbytes for t in source.weights.values())
    assert metrics["weight_sync/num_servers"] == 2 and metrics["weight_sync/num_taken_out"] == 0


def test_names_are_asked_for_when_a_server_is_new_or_comes_back() -> None:
    servers = _Servers()
    transport = _transport(servers, _Buckets())
    transport.publish(0)
    transport.publish(1)
    assert [server.asked_for_names for server in servers.servers] == [1, 1]
    servers.take_out(servers.servers[1], "it failed to answer")  # by the rollouts
    transport.publish(2)
    assert [server.asked_for_names for server in servers.servers] == [1, 2]


class _Breaks(RandomSource):
    """An export that fails in the middle, as when another rank dies."""

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for number, pair in enumerate(self.weights.items()):
            if number == len(self.weights) - 1:
                raise ConnectionError("rank 1 is gone")
            yield pair


@pytest.mark.parametrize(
    ("delivery", "source", "error"),
    [
        (_Buckets(), _Breaks(), ConnectionError),
        (_Buckets(ZeroDivisionError("a defect")), RandomSource(), ZeroDivisionError),
        (_Buckets(CheckpointError("the disk is full")), RandomSource(), EngineError),
    ],
)
def test_an_update_that_was_begun_and_not_ended_takes_all_servers_out(
    delivery: Any, source: Any, error: type[BaseException]
) -> None:
    servers = _Servers()
    with pytest.raises(error):
        _transport(servers, delivery, source).publish(3)
    assert servers.events == ["pause", "resume"]
    assert servers.out == dict.fromkeys("ab", "the update was not brought to its end")
    assert all(server.calls == ["begin"] for server in servers.servers)


def test_a_pause_that_fails_leaves_the_servers_as_they_were() -> None:
    servers = _Servers()
    servers.pause_problem = "no server can be paused"
    with pytest.raises(EngineError, match="no server can be paused"):
        _transport(servers, _Buckets()).publish(3)
    assert servers.events == ["pause", "resume"] and servers.out == {}


def test_no_server_is_an_error_before_any_pause() -> None:
    servers = _Servers()
    servers.servers = []
    with pytest.raises(EngineError, match="version 3: none is reachable"):
        _transport(servers, _Buckets()).publish(3)
    assert servers.events == []


class _Collective(RandomSource):
    """An export with a collective before each tensor, as the policy's."""

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, tensor in self.weights.items():
            dist.barrier()
            yield name, tensor if dist.get_rank() == 0 else None
        self.num_runs += 1


_ERRORS = [
    None,
    EngineError("all servers are gone"),
    CheckpointError("the disk is full"),
    ZeroDivisionError("a defect"),
    None,
]


def _outcomes() -> list[tuple[str, str, int]]:
    """Five updates on this rank: what each gave and how many exports have ended by then."""
    dist.init_process_group("gloo")
    source, delivery = _Collective(), _Buckets()
    on_rank_0 = dist.get_rank() == 0
    transport = _transport(
        _Servers() if on_rank_0 else None,
        delivery if on_rank_0 else None,
        source,
        dist.new_group(backend="gloo"),
    )
    found = []
    for version, error in enumerate(_ERRORS):
        delivery.error = error
        try:
            outcome = "sent" if transport.publish(version)["weight_sync/bytes"] else "took part"
            found.append((outcome, "", source.num_runs))
        except (EngineError, ZeroDivisionError) as raised:
            found.append((type(raised).__name__, str(raised), source.num_runs))
    return found


def test_every_rank_hears_how_it_went_and_nobody_hangs() -> None:
    first, second = run_ranks(_outcomes, 2, timeout_s=60.0)
    defect = "the controller failed in a weight update; see the log of rank 0"
    assert first == [
        ("sent", "", 1),
        ("EngineError", "all servers are gone", 2),
        ("EngineError", "the disk is full", 3),
        ("ZeroDivisionError", "a defect", 4),
        ("sent", "", 5),
    ]
    assert second == [
        ("took part", "", 1),
        ("EngineError", "all servers are gone", 2),
        ("EngineError", "the disk is full", 3),
        ("EngineError", defect, 4),
        ("took part", "", 5),
    ]


def test_engines_go_on_also_when_a_server_cannot_be_admitted() -> None:
    servers = _Servers()

    def refuse(server: _Server, policy_version: int) -> None:
        raise EngineError(f"{server.name} has the label of another run")

    servers.admit = refuse  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="a has the label of another run"):
        _transport(servers, _Buckets()).publish(3)
    assert servers.events == ["pause", "resume"]
