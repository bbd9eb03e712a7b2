"""Every transport to engine servers keeps to the contract."""

import gc
import os
from pathlib import Path

import torch

from megatron_spear.testing.transports import MODEL, check_transport
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.disk import Disk
from megatron_spear.weight_sync.ipc import Ipc
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.update import ServerTransport


def _transport(source, fleet, deadline_s, delivery):
    return ServerTransport(
        source=source,
        manifest=Manifest.of_model(MODEL, "model"),
        servers=fleet,
        delivery=delivery,
        control=None,
        deadline_s=deadline_s,
    )


def _broadcast(source, fleet, deadline_s):
    delivery = Broadcast(
        host="127.0.0.1",
        backend="gloo",
        bucket_bytes=5000,
        deadline_s=deadline_s,
        device=torch.device("cpu"),
    )
    return _transport(source, fleet, deadline_s, delivery)


def test_broadcast():
    check_transport(_broadcast)


def test_ipc():
    cpu = torch.device("cpu")
    own = f"torch_{os.getpid()}_*"
    before = set(Path("/dev/shm").glob(own))
    check_transport(
        lambda source, fleet, deadline_s: _transport(
            source, fleet, deadline_s, Ipc(bucket_bytes=5000, device=cpu)
        )
    )
    gc.collect()
    assert set(Path("/dev/shm").glob(own)) <= before


def test_disk(tmp_path):
    model, folder = tmp_path / "model", tmp_path / "weights"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    check_transport(
        lambda source, fleet, deadline_s: _transport(
            source, fleet, deadline_s, Disk(folder=folder, model=model)
        )
    )
    assert list(folder.iterdir()) == []
