"""Weights from a GPU into server processes: CUDA IPC handles, gloo through host memory, FP8."""

import torch

from megatron_spear.conversion import fp8_blocks
from megatron_spear.testing.transports import MODEL, check_transport
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.ipc import Ipc
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.update import ServerTransport


def _transport(source, fleet, deadline_s, delivery):
    source.move("cuda")
    return ServerTransport(
        source=source,
        manifest=Manifest.of_model(MODEL, "model"),
        servers=fleet,
        delivery=delivery,
        control=None,
        deadline_s=deadline_s,
    )


def test_handles_of_gpu_memory_keep_the_contract() -> None:
    delivery = Ipc(bucket_bytes=5000, device=torch.device("cuda"))
    check_transport(lambda *about: _transport(*about, delivery))


def test_gloo_from_a_gpu_keeps_the_contract() -> None:
    def make(source, fleet, deadline_s):
        delivery = Broadcast(
            host="127.0.0.1",
            backend="gloo",
            bucket_bytes=5000,
            deadline_s=deadline_s,
            device=torch.device("cpu"),
        )
        return _transport(source, fleet, deadline_s, delivery)

    check_transport(make)


def test_fp8_blocks_made_on_a_gpu_are_those_made_on_a_cpu() -> None:
    weight = torch.randn(1300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = fp8_blocks.quantize(weight.cuda())
    assert values.is_cuda and scales.is_cuda
    expected, expected_scales = fp8_blocks.quantize(weight)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(values.cpu().view(torch.uint8), expected.view(torch.uint8))
    fp8_blocks.check("weight", weight, values.cpu(), scales.cpu())
