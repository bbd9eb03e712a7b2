"""What every transport to engine servers must keep to, as checks to run against your own.

    from megatron_spear.testing.transports import check_transport

    def test_my_transport():
        check_transport(lambda source, fleet, deadline_s: MyTransport(source, fleet, deadline_s))

Servers are processes that receive for real (``testing.servers``) and are judged by what they hold.
Each check raises ContractViolation with what was got and expected.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_spear.conversion.shape import ModelShape
from megatron_spear.errors import EngineError
from megatron_spear.testing.contract import fail
from megatron_spear.testing.servers import FakeFleet, Held, ServerProcesses
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.receivers.places import engine_name
from megatron_spear.weight_sync.transport import Transport

MODEL = ModelShape(
    family="qwen3",
    num_layers=2,
    hidden_size=24,
    ffn_size=40,
    num_heads=4,
    num_groups=2,
    head_dim=6,
    vocab_size=131,
    norm_eps=1e-6,
    rope_theta=1e4,
    tied=True,
    qk_norm=True,
)
"""The model whose weights the checks send."""

_DEADLINE_S = 60.0
_SHORT_S = 2.0


@dataclass(kw_only=True)
class RandomSource:
    """A ``WeightSource`` of random weights, new ones after each ``step``; norms are float32, all
    else bfloat16. ``num_runs`` counts exports that ran to their end."""

    model: ModelShape = MODEL
    device: str = "cpu"
    seed: int = 0
    num_runs: int = 0
    weights: Held = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.step()

    def move(self, device: str) -> None:
        """Have the weights on another device from now on."""
        self.device = device
        self.weights = {name: tensor.to(device) for name, tensor in self.weights.items()}

    def step(self) -> None:
        """Other weights."""
        self.seed += 1
        draw = torch.Generator().manual_seed(self.seed)
        for name, shape in Manifest.of_model(self.model, "model").shapes.items():
            dtype = torch.float32 if "norm" in name else torch.bfloat16
            self.weights[name] = torch.randn(shape, generator=draw).to(self.device, dtype)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        yield from self.weights.items()
        self.num_runs += 1


Make = Callable[[RandomSource, FakeFleet, float], Transport]
"""A transport from the source to the fleet's servers, with a deadline in seconds."""


def check_transport(make: Make) -> None:
    """All checks below; ``make`` may call ``source.move("cuda")``."""
    check_weights_arrive(make)
    check_versions_grow(make)
    check_faults(make)
    check_lateness(make)
    check_all_fail(make)
    check_names(make)


def check_weights_arrive(make: Make) -> None:
    """Two updates: each rank of each server holds what the policy has, in its dtypes, bit by bit;
    between a pause and a resume; nothing is left after ``close``."""
    groups = len(dist.distributed_c10d._world.pg_map)
    for num_ranks in (1, 2):
        with _bench(make, num_ranks=num_ranks) as (source, fleet, _, transport):
            for version in (3, 4):
                source.step()
                metrics = transport.publish(version)
                _expect_updated(source, fleet, [0, 1], version)
                _expect_metrics(metrics, source, 2, 0)
            _expect("events are", fleet.events, ["pause", "resume"] * 2)
            _expect("exports run to their end are", source.num_runs, 2)
            transport.close()
            left = len(dist.distributed_c10d._world.pg_map)
            _expect("process groups after close are", left, groups)


def check_versions_grow(make: Make) -> None:
    """A version at or below the present one is refused before anything is touched."""
    with _bench(make) as (source, fleet, _, transport):
        transport.publish(5)
        before = {name: tensor.clone() for name, tensor in source.weights.items()}
        source.step()
        for version in (5, 4):
            _expect_error(transport, version, naming=str(version))
        source.weights = before
        _expect_updated(source, fleet, [0, 1], 5)
        _expect("events are", fleet.events, ["pause", "resume"])


def check_faults(make: Make) -> None:
    """A server that refuses, or dies, at any call of an update is taken out with the reason, the
    other goes on; the next update admits it again."""
    with _bench(make) as (source, fleet, processes, transport):
        transport.publish(0)
        calls = fleet.servers[1].called
    places = [(name, 1) for name in dict.fromkeys(calls) if name != "leave_group"]
    places += [(n, 2) for n, _ in places if n.startswith("receive_") and calls.count(n) > 1]
    for place, number in places:
        with _bench(make) as (source, fleet, processes, transport):
            version = 0
            if place != "join_group":  # which the first update does
                transport.publish(version)
            for kind in ("refuse", "die"):
                fleet.servers[1].fail(place, kind, call=number)
                source.step()
                version += 1
                metrics = transport.publish(version)
                what = f"when {place} (call {number}) should {kind}"
                _expect_updated(source, fleet, [0], version, what)
                _expect_metrics(metrics, source, 1, 1)
                _expect(f"{what}, events are", fleet.events[-2:], ["pause", "resume"])
                _expect(f"{what}, serving is", [s.serving for s in fleet.servers], [True, False])
                if kind == "die":
                    processes.restart(1)
                    fleet.servers[1].connect()
                version += 1
                transport.publish(version)
                _expect_updated(source, fleet, [0, 1], version, f"in the update after {what}")
                if place == "join_group":
                    fleet.take_out(fleet.servers[1], "so that it has to join anew")


def check_lateness(make: Make) -> None:
    """A server that does not answer costs the deadline and no more, and the others nothing."""
    with _bench(make) as (_, fleet, _, transport):
        transport.publish(0)
        places = [n for n in dict.fromkeys(fleet.servers[1].called) if n != "join_group"]
    for place in places:
        with _bench(make, _SHORT_S) as (source, fleet, processes, transport):
            transport.publish(0)
            fleet.servers[1].fail(place, "late")
            source.step()
            transport.publish(1)
            _expect_updated(source, fleet, [0], 1, f"with a server that is late at {place}")
            if "within" not in fleet.taken_out[fleet.servers[1].name]:
                fail("a late server is taken out", str(fleet.taken_out), "one that says `within`")
            processes.restart(1)


def check_all_fail(make: Make) -> None:
    """No server left is an EngineError with the reasons; engines resume, the export has run to its
    end, nobody is admitted, and the same version can be published afterwards."""
    with _bench(make) as (source, fleet, _, transport):
        transport.publish(0)
        called = fleet.servers[1].called
        place = next(name for name in called if name.startswith(("receive_", "load_")))
        for server in fleet.servers:
            server.fail(place, "refuse")
        admitted = dict(fleet.admitted)
        _expect_error(transport, 1, naming=f"told to refuse {place}")
        _expect("events are", fleet.events, ["pause", "resume"] * 2)
        _expect("exports run to their end are", source.num_runs, 2)
        _expect("admitted are", fleet.admitted, admitted)
        _expect("serving is", [server.serving for server in fleet.servers], [False, False])
        source.step()
        transport.publish(1)
        _expect_updated(source, fleet, [0, 1], 1)


def check_names(make: Make) -> None:
    """A server of another model is taken out before anything is sent to it, and the reason names
    the parameters."""
    with _bench(make) as (source, fleet, _, transport):
        other = fleet.servers[1]
        assert other.parameters is not None
        other.parameters = (other.parameters - {"model.norm.weight"}) | {"model.more.weight"}
        transport.publish(0)
        _expect_updated(source, fleet, [0], 0)
        _expect("a server of another model holds", list(other.held()[0]), [])
        for name in ("model.norm.weight", "model.more.weight"):
            if name not in fleet.taken_out[other.name]:
                fail("another model is refused by", fleet.taken_out[other.name], f"naming {name}")


@contextmanager
def _bench(
    make: Make, deadline_s: float = _DEADLINE_S, num_ranks: int = 1
) -> Iterator[tuple[RandomSource, FakeFleet, ServerProcesses, Transport]]:
    """Two servers and a transport to them."""
    source = RandomSource()
    parameters = {engine_name(name) for name in source.weights}
    with (
        ServerProcesses(2, num_ranks) as processes,
        FakeFleet(processes.addresses, parameters) as fleet,
    ):
        transport = make(source, fleet, deadline_s)
        try:
            yield source, fleet, processes, transport
        finally:
            transport.close()


def _expect_updated(
    source: RandomSource, fleet: FakeFleet, numbers: list[int], version: int, what: str = ""
) -> None:
    """These servers hold the source's weights as the version, and were admitted with it."""
    for server in (fleet.servers[number] for number in numbers):
        where = f"{what} {server.name}".strip()
        _expect(f"{where} has the version", server.version(), version)
        _expect(f"{where} is admitted with", fleet.admitted.get(server.name), version)
        for held in server.held():
            _expect(f"{where} holds", sorted(held), sorted(source.weights))
            for name, tensor in source.weights.items():
                if held[name].dtype != tensor.dtype or not torch.equal(held[name], tensor.cpu()):
                    fail(f"{where} holds {name}", str(held[name]), str(tensor))


def _expect_metrics(
    metrics: dict[str, float], source: RandomSource, updated: int, lost: int
) -> None:
    _expect("weight_sync/num_servers is", metrics["weight_sync/num_servers"], updated)
    _expect("weight_sync/num_taken_out is", metrics["weight_sync/num_taken_out"], lost)
    once = sum(tensor.nbytes for tensor in source.weights.values())
    if metrics["weight_sync/bytes"] < once:
        fail("weight_sync/bytes is", str(metrics["weight_sync/bytes"]), f"{once} or more")
    for name in ("weight_sync/pause_s", "weight_sync/send_s"):
        if not 0 < metrics[name] < _DEADLINE_S:
            fail(f"{name} is", str(metrics[name]), "seconds")


def _expect_error(transport: Transport, version: int, naming: str) -> None:
    try:
        transport.publish(version)
    except EngineError as error:
        if naming not in str(error):
            fail("the error is", repr(str(error)), f"one that names {naming!r}")
    else:
        fail(f"version {version} was", "published", "refused with an EngineError")


def _expect(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        fail(what, str(got), str(expected))
