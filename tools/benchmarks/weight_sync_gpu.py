#!/usr/bin/env python3
"""Weights from one GPU into a server process: CUDA IPC, FP8, gloo, and NCCL where there are two.

    python tools/benchmarks/weight_sync_gpu.py                    every part
    python tools/benchmarks/weight_sync_gpu.py --only ipc         of ipc, fp8, gloo, nccl
    python tools/benchmarks/weight_sync_gpu.py --device cpu       the same code without a GPU

The weights are random, of Qwen3-8B's widths in bf16, with as many layers as ``--gigabytes`` asks
for. A server is a process that copies what it receives into weights of its own, on the GPU where it
gets them there. ``copy`` is the same tensors from memory to memory of the device. Times are medians
of whole updates. NCCL takes no two ranks on one GPU.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from megatron_spear.conversion import fp8_blocks
from megatron_spear.testing.servers import FakeFleet, ServerProcesses
from megatron_spear.testing.transports import MODEL
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.ipc import Ipc
from megatron_spear.weight_sync.manifest import Manifest, Precision
from megatron_spear.weight_sync.update import Delivery, ServerTransport

GB = 10**9
LAYER = 4096 * (3 * 12_288 + 2 * 4096 + 2 * 1024)
Row = tuple[str, str]


class Weights:
    """A ``WeightSource`` of random weights on a device."""

    def __init__(self, gigabytes: float, device: str) -> None:
        self.model = dataclasses.replace(
            MODEL,
            num_layers=max(1, round(gigabytes * GB / 2 / LAYER)),
            hidden_size=4096,
            ffn_size=12_288,
            num_heads=32,
            num_groups=8,
            head_dim=128,
            vocab_size=16_384,
        )
        shapes = Manifest.of_model(self.model, "model").shapes
        self.tensors = {
            name: torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(0.02)
            for name, shape in shapes.items()
        }
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        yield from self.tensors.items()


def ipc(weights: Weights, options: argparse.Namespace) -> Iterator[Row]:
    """Handles to a process on the same device, in bf16 and in FP8."""
    targets = {name: torch.empty_like(tensor) for name, tensor in weights.tensors.items()}

    def copy() -> None:
        for name, tensor in weights.tensors.items():
            targets[name].copy_(tensor)

    yield "copy", _rate(weights, _seconds(copy, options))
    targets.clear()
    precisions: tuple[Precision, ...] = ("model", "fp8")
    for precision in precisions:
        delivery = Ipc(bucket_bytes=options.bucket_bytes, device=torch.device(options.device))
        yield f"ipc, precision {precision}", _update(weights, delivery, precision, options)


def fp8(weights: Weights, options: argparse.Namespace) -> Iterator[Row]:
    """Quantizing alone."""
    quantized = Manifest.of_model(weights.model, "fp8").quantized

    def quantize() -> None:
        for name in quantized:
            fp8_blocks.quantize(weights.tensors[name])

    yield "quantize in blocks", _rate(weights, _seconds(quantize, options))


def gloo(weights: Weights, options: argparse.Namespace) -> Iterator[Row]:
    """Broadcast through host memory."""
    yield "broadcast, gloo", _update(weights, _broadcast("gloo", "cpu", options), "model", options)


def nccl(weights: Weights, options: argparse.Namespace) -> Iterator[Row]:
    """Broadcast to a second GPU."""
    if torch.cuda.device_count() < 2:
        yield "broadcast, nccl", "skipped: it needs two GPUs"
        return
    delivery = _broadcast("nccl", "cuda:0", options)
    yield "broadcast, nccl", _update(weights, delivery, "model", options)


def _broadcast(
    backend: Literal["gloo", "nccl"], device: str, options: argparse.Namespace
) -> Broadcast:
    return Broadcast(
        host="127.0.0.1",
        backend=backend,
        bucket_bytes=options.bucket_bytes,
        deadline_s=60.0,
        device=torch.device(device),
    )


def _update(
    weights: Weights, delivery: Delivery, precision: Precision, options: argparse.Namespace
) -> str:
    """Updates of one server process."""
    with ServerProcesses(1) as processes, FakeFleet(processes.addresses, None) as fleet:
        transport = ServerTransport(
            source=weights,
            manifest=Manifest.of_model(weights.model, precision),
            servers=fleet,
            delivery=delivery,
            control=None,
            deadline_s=60.0,
        )
        versions = itertools.count()
        seconds = _seconds(lambda: transport.publish(next(versions)), options)
        transport.close()
    return _rate(weights, seconds)


def _seconds(run: Callable[[], object], options: argparse.Namespace) -> float:
    """Median, after one round that does not count."""
    times = []
    for _ in range(options.rounds + 1):
        started = time.perf_counter()
        run()
        if options.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _rate(weights: Weights, seconds: float) -> str:
    return f"{weights.num_bytes / GB / seconds:.2f} GB/s of bf16 weights ({seconds:.3f} s)"


PARTS = {"ipc": ipc, "fp8": fp8, "gloo": gloo, "nccl": nccl}


def main() -> int:
    """Run the parts and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="this part (repeatable)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--bucket-bytes", type=int, default=512 * 2**20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("weight_sync_gpu: no CUDA device; --device cpu runs it without", file=sys.stderr)
        return 2
    chip = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    weights = Weights(options.gigabytes, options.device)
    print(f"{chip}, torch {torch.__version__}, {weights.num_bytes / GB:.2f} GB\n")
    print(f"| {'what':<28} | {'seen':<44} |\n|{'-' * 30}|{'-' * 46}|")
    for name in options.only or PARTS:
        for what, seen in PARTS[name](weights, options):
            print(f"| {what:<28} | {seen:<44} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
