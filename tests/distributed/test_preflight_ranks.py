"""The all-reduce of a preflight on ranks of this machine, each of which stands for a node."""

import datetime
import time

import torch.distributed as dist

from megatron_spear.cluster.preflight.probe import measure
from megatron_spear.testing.ranks import run_ranks

BYTES = 1 << 16
SLOW_S = 0.3


def _measured(floor, slow_rank):
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))

    def all_reduce(tensor, group=None):
        if dist.get_rank() == slow_rank:
            time.sleep(SLOW_S)
        dist.all_reduce(tensor, group=group)

    found = measure(
        dist.get_rank(),
        1,
        dist.get_world_size(),
        floor=floor,
        num_bytes=BYTES,
        all_reduce=all_reduce,
    )
    dist.destroy_process_group()
    return found


def _run(floor, slow_rank=None, num_nodes=3):
    return run_ranks(_measured, num_nodes, floor, slow_rank)


def test_enough_is_enough():
    assert [found["slow"] for found in _run(1.0, num_nodes=2)] == [[], []]


def test_the_slow_node_is_found():
    # With the sleep 4/3 * 65536 bytes / 0.3 s are below 0.3 MB/s.
    found = _run(5e5, slow_rank=1)
    assert [f["slow"] for f in found] == [[1]] * 3
    assert all(0 < f["bytes_per_s"] < 0.3e6 for f in found)
