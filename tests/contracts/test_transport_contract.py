"""Every transport to engine servers keeps to the contract."""

import torch

from megatron_spear.testing.transports import MODEL, check_transport
from megatron_spear.weight_sync.broadcast import Broadcast
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
