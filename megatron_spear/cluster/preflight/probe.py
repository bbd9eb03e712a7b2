"""A short all-reduce over all trainer ranks, and which node holds it up: a program for torchrun.

    torchrun ... -m megatron_spear.cluster.preflight.probe --backend nccl --floor 4e10 --output FILE

Bandwidth is 2 (n - 1) / n x bytes / seconds for n ranks (the "bus bandwidth" of NCCL's tests, which
does not depend on n where links are the limit). Where it is below the floor, each node measures
with its neighbours on a ring, in two or three rounds; a node is slow if even the better of its two
pairs is below the floor. A good node between two slow ones is taken for slow; two nodes cannot tell
which of them is slow.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

_BYTES = {"nccl": 256 << 20, "gloo": 8 << 20}
_REPEATS = 5


def ring_rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours of a ring in rounds in which no node has two pairs.

    Example: 5 nodes are ``[[(0, 1), (2, 3)], [(1, 2), (3, 4)], [(4, 0)]]``.
    """
    if num_nodes < 3:
        return []
    pairs = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    last = [pairs.pop()] if num_nodes % 2 else []
    rounds = [pairs[0::2], pairs[1::2], last]
    return [r for r in rounds if r]


def slow_nodes(num_nodes: int, by_pair: dict[tuple[int, int], float], floor: float) -> list[int]:
    """Nodes whose better pair is below the floor; none where all are: the network is to blame then,
    or the floor."""
    best = {
        node: max((rate for pair, rate in by_pair.items() if node in pair), default=floor)
        for node in range(num_nodes)
    }
    slow = [node for node, rate in best.items() if rate < floor]
    return slow if len(slow) < num_nodes else []


def measure(
    rank: int,
    ranks_per_node: int,
    num_nodes: int,
    *,
    floor: float,
    num_bytes: int,
    device: str = "cpu",
    all_reduce: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Bytes a second of all ranks, and the slow nodes if that is below ``floor``; collective.

    ``all_reduce(tensor, group=...)`` is torch's unless given.
    """
    import torch
    import torch.distributed as dist

    reduce = all_reduce or dist.all_reduce
    data = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)

    def rate(group: Any, size: int) -> float:
        reduce(data, group=group)  # connections are made
        _wait(device)
        began = time.perf_counter()
        for _ in range(_REPEATS):
            reduce(data, group=group)
        _wait(device)
        seconds = torch.tensor([time.perf_counter() - began], device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
        return 2 * (size - 1) / size * num_bytes * _REPEATS / float(seconds.item())

    whole = rate(None, ranks_per_node * num_nodes)
    if whole >= floor:
        return {"bytes_per_s": whole, "slow": []}
    rounds = ring_rounds(num_nodes)
    pairs = [pair for in_round in rounds for pair in in_round]
    members = {
        pair: [n * ranks_per_node + r for n in pair for r in range(ranks_per_node)]
        for pair in pairs
    }
    groups = {pair: dist.new_group(sorted(members[pair])) for pair in pairs}
    rates = torch.zeros(max(len(pairs), 1), device=device)
    for in_round in rounds:
        for pair in in_round:
            if rank in members[pair]:
                found = rate(groups[pair], len(members[pair]))
                if rank == min(members[pair]):
                    rates[pairs.index(pair)] = found
        dist.barrier()
    dist.all_reduce(rates)
    by_pair = dict(zip(pairs, rates.tolist(), strict=False))
    return {"bytes_per_s": whole, "slow": slow_nodes(num_nodes, by_pair, floor)}


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure under torchrun; rank 0 writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=tuple(_BYTES), required=True)
    parser.add_argument("--floor", type=float, required=True, help="bytes a second")
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    import torch
    import torch.distributed as dist

    from megatron_spear.files import write_whole

    local = int(os.environ["LOCAL_RANK"])
    device = "cpu"
    if options.backend == "nccl":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group(options.backend, timeout=timedelta(seconds=options.timeout_s))
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    found = measure(
        dist.get_rank(),
        ranks_per_node,
        dist.get_world_size() // ranks_per_node,
        floor=options.floor,
        num_bytes=_BYTES[options.backend],
        device=device,
    )
    if dist.get_rank() == 0:
        write_whole(options.output, json.dumps(found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
