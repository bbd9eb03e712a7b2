#!/usr/bin/env python3
"""Weights into engines: within the process against memcpy, by broadcast against a bare broadcast.

    python tools/benchmarks/weight_sync.py [--gigabytes 1] [--dtype fp32 bf16] [--rounds 5]

``in process`` is one update of the embedded engine from the Megatron policy, with everything it
does: export to Hugging Face names, copy into the engine, and in fp32 the packing of matrices below
64 MB for oneDNN, which reads and writes them once more. memcpy copies the same tensors to other
memory that is there already. ``broadcast`` is one update of a server, a process that receives into
memory and copies what it got to its weights, over gloo on this machine in buckets; against it one
bare broadcast of as many bytes from buffer to buffer. Sides take turns; times are medians.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_spear import peer_groups
from megatron_spear.config.schema import OptimizerSection, PolicySection
from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.safetensors_out import write_safetensors
from megatron_spear.conversion.shape import load_config, model_shape
from megatron_spear.policy import parallel
from megatron_spear.policy.policy import MegatronPolicy
from megatron_spear.rollout.engines.embedded import EmbeddedEngine
from megatron_spear.testing.servers import FakeFleet, ServerProcesses
from megatron_spear.weight_sync.broadcast import Broadcast
from megatron_spear.weight_sync.in_process import InProcess
from megatron_spear.weight_sync.manifest import Manifest
from megatron_spear.weight_sync.update import ServerTransport

GB = 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH, INNER, VOCAB = 2048, 6144, 16_384
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
"""Qwen3-1.7B's widths."""


def make(folder: Path, num_bytes: float, dtype: torch.dtype) -> None:
    """A Qwen3 folder of about this size with random weights."""
    from transformers import Qwen3Config

    layer = 3 * INNER + 2 * WIDTH + 2 * WIDTH // 2
    values = num_bytes / dtype.itemsize / WIDTH
    layers = max(1, round((values - 2 * VOCAB) / layer))
    folder.mkdir()
    config = Qwen3Config(**SIZE, num_hidden_layers=layers, dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    )
    named = {
        name: shape
        for item in weight_table(model_shape(load_config(folder)))
        for name, shape in zip(item.sources, item.shapes, strict=True)
    }
    tensors = ((name, torch.randn(s).mul_(0.02).to(dtype)) for name, s in named.items())
    with (folder / "model.safetensors").open("wb") as file:
        write_safetensors(file, {name: (s, dtype) for name, s in named.items()}, tensors)


def in_process(folder: Path, policy: MegatronPolicy, options: argparse.Namespace) -> None:
    """One line: GB/s of an update and of memcpy."""
    engine = EmbeddedEngine.from_hf(folder, max_slots=1, max_context=32, deadline_s=60.0)
    transport = InProcess(source=policy, receiver=engine)
    targets = {name: torch.empty_like(tensor) for name, tensor in _exported(policy)}
    tensors = {name: tensor.clone() for name, tensor in _exported(policy)}

    def copy() -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)

    versions = itertools.count()
    size = sum(tensor.nbytes for tensor in tensors.values())
    update, plain = _seconds([lambda: transport.publish(next(versions)), copy], options.rounds)
    _row("in process", size, update, "memcpy", plain)


def broadcast(folder: Path, policy: MegatronPolicy, options: argparse.Namespace) -> None:
    """One line: GB/s of an update of a server process and of a bare broadcast to it."""
    with ServerProcesses(1) as processes, FakeFleet(processes.addresses, None) as fleet:
        transport = ServerTransport(
            source=policy,
            manifest=Manifest.of_model(policy.shape, "model"),
            servers=fleet,
            delivery=Broadcast(
                host="127.0.0.1",
                backend="gloo",
                bucket_bytes=options.bucket_bytes,
                deadline_s=120.0,
                device=torch.device("cpu"),
            ),
            control=None,
            deadline_s=120.0,
        )
        size = sum(tensor.nbytes for _, tensor in _exported(policy))
        buffer = torch.zeros(size, dtype=torch.uint8)
        with _bare_receiver(size, options.rounds + 1) as group:
            versions = itertools.count()
            update, plain = _seconds(
                [
                    lambda: transport.publish(next(versions)),
                    lambda: dist.broadcast(buffer, src=0, group=group),
                ],
                options.rounds,
            )
        _row("broadcast", size, update, "bare", plain)
        transport.close()


PARTS = {"in_process": in_process, "broadcast": broadcast}


@contextmanager
def _bare_receiver(size: int, count: int) -> Iterator[dist.ProcessGroup]:
    """A group with a process that receives ``count`` broadcasts of ``size`` bytes."""
    store = peer_groups.listen("127.0.0.1", timeout_s=120.0)
    process = multiprocessing.get_context("spawn").Process(
        target=_receive, args=(store.port, size, count)
    )
    process.start()
    group = _join(store.port, 0)
    try:
        yield group
        process.join(120.0)
    finally:
        process.kill()
        peer_groups.leave(group)


def _receive(port: int, size: int, count: int) -> None:
    torch.set_num_threads(1)
    group = _join(port, 1)
    buffer = torch.zeros(size, dtype=torch.uint8)
    for _ in range(count):
        dist.broadcast(buffer, src=0, group=group)


def _join(port: int, rank: int) -> dist.ProcessGroup:
    return peer_groups.join(
        backend="gloo",
        host="127.0.0.1",
        port=port,
        rank=rank,
        world_size=2,
        name="bare",
        timeout_s=120.0,
        store=peer_groups.connect("127.0.0.1", port, timeout_s=120.0),
    )


def _exported(policy: MegatronPolicy) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in policy.export_weights():
        assert tensor is not None
        yield name, tensor


def _seconds(sides: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each side; they take turns, after one round that does not count."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, seen in zip(sides, times, strict=True):
            started = time.perf_counter()
            side()
            seen.append(time.perf_counter() - started)
    return [statistics.median(seen[1:]) for seen in times]


def _row(what: str, size: int, update: float, against: str, plain: float) -> None:
    rates = f"{size / GB / update:8.2f} GB/s   {against} {size / GB / plain:6.2f} GB/s"
    print(f"{what:24}{size / GB:6.2f} GB {rates}   {plain / update:.2f}x", flush=True)


def main() -> None:
    """Make the model, run both parts for each dtype, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bucket-bytes", type=int, default=64 * 2**20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ctx = parallel.initialize(PolicySection(), seed=0)
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            make(folder, options.gigabytes * GB, DTYPES[dtype])
            section = PolicySection(precision=dtype)
            policy = MegatronPolicy.from_hf(folder, section, OptimizerSection(), 1, ctx)
            print(f"{dtype}, {options.threads} threads", flush=True)
            for part in options.part:
                PARTS[part](folder, policy, options)
            del policy
    parallel.destroy()


if __name__ == "__main__":
    main()
