#!/usr/bin/env python3
"""Seconds of a weight update: slice by slice, against a bare send and gather-then-broadcast.

python tools/benchmarks/weight_sync_sharded.py [--repetitions 5] [--layers 16] [--bucket-mib 64]

Two training ranks (tensor parallel) and two engine ranks, each a process, over gloo; random weights
in bf16. In each repetition, one after the other:

    raw        the bytes that have to travel, from flat memory to flat memory: the lower bound
    sharded    the ``sharded`` transport: plan, handshake, packing, sending, unpacking
    broadcast  what frameworks do: gather each tensor in training, broadcast it to all engine ranks,
               each of which keeps its part
"""

import argparse
import multiprocessing
import os
import pickle
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_spear.conversion.families import weight_table
from megatron_spear.conversion.shape import ModelShape
from megatron_spear.conversion.slices import TensorSlice, slices_of
from megatron_spear.testing.engine_rank import Rank
from megatron_spear.testing.engine_servers import Servers
from megatron_spear.testing.engine_shards import engine_parameters
from megatron_spear.weight_sync.layouts import EngineLayout, TrainingLayout
from megatron_spear.weight_sync.receivers.places import locate
from megatron_spear.weight_sync.sharded.schedule import ReplicaSchedule, schedules
from megatron_spear.weight_sync.sharded.transport import Sharded

TRAINING, ENGINES = 2, 2
WORLD = TRAINING + ENGINES
DEADLINE_S = 300.0
REUSED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Freed memory is used again, as by a GPU's allocator: else page faults of its new tensors would
cost ``broadcast`` more than sending does."""


def model(num_layers: int) -> ModelShape:
    """61 M parameters a layer, 67 M of embedding."""
    return ModelShape(
        family="llama", num_layers=num_layers, hidden_size=2048, ffn_size=8192, num_heads=32,
        num_groups=8, head_dim=64, vocab_size=32_768, norm_eps=1e-6, rope_theta=1e4, tied=True,
    )  # fmt: skip


class Trainer:
    """A training rank's part of random weights."""

    def __init__(self, shape: ModelShape, rank: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.parts: dict[int, torch.Tensor] = {}
        self.slices: list[TensorSlice] = []
        for number, item in enumerate(weight_table(shape)):
            if item.tied:
                continue
            wholes = [torch.randn(size, generator=draw).to(torch.bfloat16) for size in item.shapes]
            part = item.part(wholes, rank, TRAINING).clone()
            self.parts[number] = part
            values = partial(self.parts.__getitem__, number)
            self.slices += slices_of(item, values, part.dtype, rank, TRAINING)

    def local_slices(self) -> Sequence[TensorSlice]:
        return self.slices


class QueuedServer:
    """An ``UpdateServer`` of engine ranks that wait at queues."""

    def __init__(self, name: str, ranks: Sequence[tuple[Any, Any]]) -> None:
        self.name, self.num_ranks = name, len(ranks)
        self._ranks, self.serving = ranks, False
        self._pool = ThreadPoolExecutor(1)

    def begin_update(self) -> "Future[None]":
        return self._pool.submit(lambda: None)

    def end_update(self, policy_version: int) -> "Future[None]":
        return self._pool.submit(lambda: None)

    def receive_payloads(
        self, payloads: Sequence[bytes], load_format: str | None, policy_version: int
    ) -> "Future[None]":
        def receive() -> None:
            for (tell, _), payload in zip(self._ranks, payloads, strict=True):
                tell.put(payload)
            for _, answer in self._ranks:
                answer.get(timeout=DEADLINE_S)

        return self._pool.submit(receive)


def timed(work: Any) -> float:
    """Seconds of the slowest process."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - begin


def pairs(planned: Sequence[ReplicaSchedule], num_ranks: int) -> dict[tuple[int, int], int]:
    """Bytes by (training rank, process of the engine rank)."""
    found: dict[tuple[int, int], int] = {}
    for replica, schedule in enumerate(planned):
        for bucket in schedule.buckets:
            pair = (bucket.source, TRAINING + replica * num_ranks + bucket.target)
            found[pair] = found.get(pair, 0) + bucket.num_bytes
    return found


def raw(rank: int, flats: dict[tuple[int, int], torch.Tensor]) -> None:
    """All pairs at once, one message each."""
    works = [
        dist.isend(flat, pair[1]) if pair[0] == rank else dist.irecv(flat, pair[0])
        for pair, flat in flats.items()
    ]
    for work in works:
        work.wait()


def broadcast(
    shape: ModelShape, rank: int, trainer: Trainer | None, keep: Any, groups: dict[str, Any]
) -> None:
    """Gather, then broadcast, one parameter after the other."""
    for number, item in enumerate(weight_table(shape)):
        if item.tied:
            continue
        full: Sequence[torch.Tensor] = [torch.empty(0)]
        if trainer is not None:
            part = trainer.parts[number]
            if item.split_axis is None:
                full = item.to_hf(part)
            else:
                shards = [torch.empty_like(part) for _ in range(TRAINING)]
                dist.all_gather(shards, part, group=groups["training"])
                full = item.to_hf(item.unshard(shards)) if rank == 0 else full
        if rank != 0 and trainer is not None:
            continue
        for source, name in enumerate(item.sources):
            whole = (
                full[source].contiguous()
                if rank == 0
                else torch.empty(item.shapes[source], dtype=torch.bfloat16)
            )
            dist.broadcast(whole, src=0, group=groups["broadcast"])
            if rank != 0:
                keep(name, whole)


def keeper(rank: Rank, schedule: ReplicaSchedule, own: int) -> Any:
    """What puts an engine rank's part of a whole tensor into its parameters."""
    held = schedule.tensors[own]
    views = locate(held, rank.parameters())
    places = {tensor.name: (tensor, view) for tensor, view in zip(held, views, strict=True)}

    def keep(name: str, whole: torch.Tensor) -> None:
        tensor, view = places[name]
        view.copy_(whole.narrow(tensor.axis, tensor.start, tensor.stop - tensor.start))

    return keep


def process(
    rank: int, store: str, args: Any, queues: Sequence[tuple[Any, Any]], results: Any
) -> None:
    """One of the four."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=600)
    )
    groups = {
        "training": dist.new_group(list(range(TRAINING))),
        "broadcast": dist.new_group([0, *range(TRAINING, WORLD)]),
    }
    shape = model(args.layers)
    trainer = Trainer(shape, rank) if rank < TRAINING else None
    for num_ranks in (2, 1):
        planned = schedules(
            shape,
            TrainingLayout(tensor=TRAINING),
            EngineLayout(tensor=num_ranks, replicas=ENGINES // num_ranks),
            dtype=torch.bfloat16,
            fp8=False,
            bucket_bytes=args.bucket_mib << 20,
        )
        case(rank, num_ranks, planned, trainer, shape, args, queues, groups, results)
    dist.barrier()
    dist.destroy_process_group()


def case(
    rank: int,
    num_ranks: int,
    planned: Sequence[ReplicaSchedule],
    trainer: Trainer | None,
    shape: ModelShape,
    args: Any,
    queues: Sequence[tuple[Any, Any]],
    groups: dict[str, Any],
    results: Any,
) -> None:
    """All repetitions of one engine layout."""
    mine = {pair: n for pair, n in pairs(planned, num_ranks).items() if rank in pair}
    flats = {pair: torch.zeros(num_bytes, dtype=torch.uint8) for pair, num_bytes in mine.items()}
    engine, keep, versions = Rank(), None, count()
    transport: Sharded | None = None
    if trainer is not None:
        servers: Any = None
        if rank == 0:
            servers = Servers(
                [
                    QueuedServer(f"engine {n}", queues[n * num_ranks : (n + 1) * num_ranks])  # type: ignore[misc]
                    for n in range(ENGINES // num_ranks)
                ]
            )
        transport = Sharded(
            source=trainer,
            ranks=SimpleNamespace(
                rank=rank, world_size=TRAINING, device=torch.device("cpu"),
                control=groups["training"],
            ),
            servers=servers,
            model=shape,
            training=TrainingLayout(tensor=TRAINING),
            host="127.0.0.1",
            bucket_bytes=args.bucket_mib << 20,
            precision="model",
            deadline_s=DEADLINE_S,
        )  # fmt: skip
    else:
        replica, own = divmod(rank - TRAINING, num_ranks)
        empty = {
            name: torch.empty(size, dtype=torch.bfloat16, device="meta")
            for item in weight_table(shape)
            if not item.tied
            for name, size in zip(item.sources, item.shapes, strict=True)
        }
        local = engine_parameters(empty, shape, rank=own, size=num_ranks)
        engine.build({name: (tuple(value.shape), value.dtype) for name, value in local.items()})
        keep = keeper(engine, planned[replica], own)

    def sharded() -> None:
        if transport is not None:
            transport.publish(next(versions))
        else:
            tell, answer = queues[rank - TRAINING]
            engine.load(tell.get(timeout=DEADLINE_S))
            answer.put(None)

    ways = {
        "raw": lambda: raw(rank, flats),
        "sharded": sharded,
        "broadcast": lambda: broadcast(shape, rank, trainer, keep, groups),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(args.repetitions + 1):
        for name, work in ways.items():
            spent = timed(work)
            if repetition:  # the first builds groups and touches memory
                seconds[name].append(spent)
    if transport is not None:
        transport.close()
    if rank == 0:
        needed = sum(schedule.needed_bytes for schedule in planned)
        travels = sum(bucket.num_bytes for schedule in planned for bucket in schedule.buckets)
        results.put(pickle.dumps((num_ranks, seconds, needed, travels)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--bucket-mib", type=int, default=64)
    args = parser.parse_args()
    os.environ |= REUSED_MEMORY
    context = multiprocessing.get_context("spawn")
    queues = [(context.Queue(), context.Queue()) for _ in range(ENGINES)]
    results = context.Queue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    url = f"tcp://127.0.0.1:{store.port}"
    del store
    processes = [
        context.Process(target=process, args=(rank, url, args, queues, results), daemon=True)
        for rank in range(WORLD)
    ]
    for one in processes:
        one.start()
    for _ in (2, 1):
        num_ranks, seconds, needed, travels = pickle.loads(results.get(timeout=1200))
        print(f"{ENGINES // num_ranks} engine(s) of TP{num_ranks}: {needed / 1e9:.3f} GB needed")
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        for name, times in seconds.items():
            print(
                f"  {name:10s} {middle[name]:6.2f} s  ({min(times):.2f} to {max(times):.2f})  "
                f"{needed / middle[name] / 1e9:5.2f} GB/s"
            )
        print(f"  sharded: bytes sent / needed {travels / needed:.4f}")
        print(f"  sharded / raw {middle['sharded'] / middle['raw']:.2f} (aim <= 1.4)")
        print(f"  broadcast / sharded {middle['broadcast'] / middle['sharded']:.2f} (aim >= 2)")
    for one in processes:
        one.join(60)


if __name__ == "__main__":
    main()
