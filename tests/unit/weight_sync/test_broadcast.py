"""Broadcasts of a policy on two ranks to servers of two ranks; groups are kept, and made anew."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spear.conversion.hf_io import HfReader
from megatron_spear.errors import EngineError
from megatron_spear.testing.ranks import run_ranks
from megatron_spear.testing.servers import FakeFleet, Held, ServerProcesses
from megatron_spear.testing.tiny import tiny_hf_folder
from megatron_spear.testing.transports import MODEL, RandomSource
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.update import ServerTransport

CPU = torch.device("cpu")


def _delivery(deadline_s: float = 60.0) -> Broadcast:
    return Broadcast(
        host="127.0.0.1", backend="gloo", bucket_bytes=20_000, deadline_s=deadline_s, device=CPU
    )


def _on_a_rank(folder: Path, addresses: list[list[str]]) -> tuple[list[Any], list[Held]]:
    """Three updates of a policy with tensor parallel 2: what each gave, what server 0 has then."""
    from megatron_spear.config.schema import OptimizerSection, PolicySection
    from megatron_spear.policy import parallel
    from megatron_spear.policy.policy import MegatronPolicy

    section = PolicySection(tensor_parallel=2, precision="fp32")
    ctx = parallel.initialize(section, seed=0, timeout_s=60.0)
    policy = MegatronPolicy.from_hf(folder, section, OptimizerSection(), 1, ctx)
    fleet = FakeFleet(addresses, None) if ctx.is_controller else None
    if fleet is not None:
        fleet.__enter__()
    transport = ServerTransport(
        source=policy,
        manifest=Manifest.of_model(policy.shape, "model"),
        servers=fleet,
        delivery=_delivery() if ctx.is_controller else None,
        control=ctx.control,
        deadline_s=60.0,
    )
    found: list[Any] = []
    held: list[Held] = []
    for version, broken in enumerate(((), (1,), (0, 1))):
        for number in broken if fleet is not None else ():
            fleet.servers[number].fail("receive_broadcast", "refuse", call=2)
        try:
            found.append(transport.publish(version).get("weight_sync/num_servers"))
        except EngineError as error:
            found.append(str(error))
        if fleet is not None and version == 1:
            held = fleet.servers[0].held()
    transport.close()
    return found, held


def test_a_policy_on_two_ranks_to_servers_of_two_ranks(tmp_path: Path) -> None:
    tiny_hf_folder(tmp_path, "Qwen3")
    with ServerProcesses(2, num_ranks=2) as processes:
        (first, held), (second, _) = run_ranks(
            _on_a_rank, 2, tmp_path, processes.addresses, timeout_s=120.0
        )
    assert first[:2] == [2, 1] and second[:2] == [None, None]
    assert first[2] == second[2] and "told to refuse receive_broadcast" in first[2]
    with HfReader(tmp_path) as reader:
        expected = {name: reader.get(name) for name in reader.names}
    assert len(held) == 2
    for rank in held:
        assert rank.keys() == expected.keys()
        assert all(torch.equal(rank[name], tensor) for name, tensor in expected.items())


def _to(fleet: FakeFleet, deadline_s: float = 60.0) -> ServerTransport:
    return ServerTransport(
        source=RandomSource(),
        manifest=Manifest.of_model(MODEL, "model"),
        servers=fleet,
        delivery=_delivery(deadline_s),
        control=None,
        deadline_s=deadline_s,
    )


def test_a_group_is_kept_until_its_server_fails() -> None:
    with ServerProcesses(2) as processes, FakeFleet(processes.addresses, None) as fleet:
        transport = _to(fleet)
        for version in range(3):
            transport.publish(version)
        assert [server.called.count("join_group") for server in fleet.servers] == [1, 1]
        fleet.servers[1].fail("receive_broadcast", "refuse")
        transport.publish(3)
        transport.publish(4)
        assert [server.called.count("join_group") for server in fleet.servers] == [1, 2]
        assert fleet.servers[1].called.count("leave_group") >= 1
        transport.close()
        assert fleet.servers[0].called[-1] == "leave_group"


def test_a_server_that_does_not_join_is_not_waited_for_once_it_has_said_so() -> None:
    with ServerProcesses(2) as processes, FakeFleet(processes.addresses, None) as fleet:
        fleet.servers[1].fail("join_group", "refuse")
        transport = _to(fleet)
        started = time.monotonic()
        assert transport.publish(0)["weight_sync/num_servers"] == 1
        transport.close()
        while any("weight-group" in thread.name for thread in threading.enumerate()):
            assert time.monotonic() < started + 30.0, "the join of 60 s is still waited for"
            time.sleep(0.05)


def test_an_error_of_gloo_is_told_in_short() -> None:
    with ServerProcesses(1) as processes, FakeFleet(processes.addresses, None) as fleet:
        transport = _to(fleet)
        transport.publish(0)
        fleet.servers[0].fail("receive_broadcast", "die")
        with pytest.raises(EngineError) as caught:
            transport.publish(1)
        assert "GLHF" not in str(caught.value) and len(str(caught.value)) < 400
        transport.close()
