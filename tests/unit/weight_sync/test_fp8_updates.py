"""FP8 rollouts: weights are quantized before they are sent, and both sides hold the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spear.conversion import fp8_blocks
from megatron_spear.errors import EngineError
from megatron_spear.testing.servers import FakeFleet, ServerProcesses
from megatron_spear.testing.transports import MODEL, RandomSource
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.disk import Disk
from megatron_spear.weight_sync.ipc import Ipc
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.receivers.places import engine_name
from megatron_spear.weight_sync.update import ServerTransport

CPU = torch.device("cpu")
FP8 = Manifest.of_model(MODEL, "fp8")


def _broadcast(folder: Path) -> Broadcast:
    return Broadcast(
        host="127.0.0.1", backend="gloo", bucket_bytes=4001, deadline_s=60.0, device=CPU
    )


def _ipc(folder: Path) -> Ipc:
    return Ipc(bucket_bytes=4001, device=CPU)


def _disk(folder: Path) -> Disk:
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return Disk(folder=folder / "weights", model=folder, precision="fp8")


def _transport(
    fleet: FakeFleet, source: RandomSource, delivery: Any, manifest: Manifest = FP8
) -> ServerTransport:
    return ServerTransport(
        source=source,
        manifest=manifest,
        servers=fleet,
        delivery=delivery,
        control=None,
        deadline_s=60.0,
    )


@pytest.mark.parametrize("way", [_broadcast, _ipc, _disk])
def test_servers_hold_what_the_training_side_made(way: Any, tmp_path: Path) -> None:
    """Names, dtypes and bits of values and scales, on every rank; and of what is not quantized."""
    source = RandomSource()
    expected = dict(FP8.tensors(source.export_weights()))
    with (
        ServerProcesses(2, num_ranks=2) as processes,
        FakeFleet(processes.addresses, map(engine_name, FP8.names)) as fleet,
    ):
        transport = _transport(fleet, source, way(tmp_path))
        metrics = transport.publish(1)
        held = [rank for server in fleet.servers for rank in server.held()]
        transport.close()
    assert len(held) == 4
    for rank in held:
        assert rank.keys() == expected.keys() == set(FP8.names)
        for name, tensor in expected.items():
            assert rank[name].dtype is tensor.dtype, name
            assert torch.equal(rank[name].view(torch.uint8), tensor.view(torch.uint8)), name
        for name in FP8.quantized:
            scales = rank[name + fp8_blocks.SCALE]
            fp8_blocks.check(name, source.weights[name], rank[name], scales)
    sent = sum(tensor.nbytes for tensor in expected.values())
    assert metrics["weight_sync/bytes"] == sent * (1 if way is _disk else 2)


def test_a_server_that_shows_scales_gets_fp8_or_nothing() -> None:
    with (
        ServerProcesses(1) as processes,
        FakeFleet(processes.addresses, map(engine_name, FP8.names)) as fleet,
    ):
        plain = Manifest.of_model(MODEL, "model")
        transport = _transport(fleet, RandomSource(), _ipc(Path()), plain)
        with pytest.raises(EngineError, match=r"set weight_sync.precision=fp8"):
            transport.publish(1)
        assert fleet.servers[0].called == [] and not fleet.servers[0].held()[0]
