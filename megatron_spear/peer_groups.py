"""Process groups between processes that share no default group: trainer and engines.

The same on both sides of a weight update. Meets at a TCP store under the group's name, as SGLang's
``init_custom_process_group`` does, so that its servers can be the other side.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def meeting_point(timeout_s: float) -> dist.TCPStore:
    """A store on a free port (``.port``) of this process, for all groups it is rank 0 of.

    Once it is dropped, those who still wait there for others fail.
    """
    return dist.TCPStore(
        "localhost",
        0,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


def join(
    *,
    backend: str,
    host: str,
    port: int,
    rank: int,
    world_size: int,
    name: str,
    timeout_s: float,
    device: torch.device | None = None,
    hosts: bool = True,
) -> dist.ProcessGroup:
    """The group of ``world_size`` processes; rank 0 hosts the store at ``host:port``, unless
    ``hosts`` is False since its ``meeting_point`` is there.

    Returns once all have joined; ``timeout_s`` is for that and for each collective. Ranks are those
    within the group, also as ``src`` and ``dst``. Raises torch.distributed.DistError (a
    RuntimeError) when somebody is missing.
    """
    timeout = timedelta(seconds=timeout_s)
    # Not torch's rendezvous: under torchrun every process would be a client of torchrun's store.
    store = dist.TCPStore(
        host,
        port,
        is_master=hosts and rank == 0,
        timeout=timeout,
        wait_for_workers=False,
    )
    # Two private names of torch: it has no public way to a group without a default one.
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=name,
        backend_options=None,
        timeout=timeout,
        device_id=device,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def leave(group: Any) -> None:
    """End this process's part of the group, its threads and sockets."""
    dist.destroy_process_group(group)
