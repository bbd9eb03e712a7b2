"""Process groups between processes that share no default group: trainer and engines.

The same on both sides of a weight update. Meets at a TCP store under the group's name, as SGLang's
``init_custom_process_group`` does, so that its servers can be the other side.
"""

from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.distributed import distributed_c10d as c10d


def listen(host: str, *, port: int = 0, timeout_s: float) -> TCPStore:
    """A store of this process that the others find at ``host`` and its ``port``; 0 takes a free
    one.

    ``host`` has to be a name of this machine that the others know. ``timeout_s`` is for each wait.
    """
    # Not by torch's rendezvous, which under torchrun lets no rank listen.
    return TCPStore(
        host, port, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def connect(host: str, port: int, *, timeout_s: float) -> TCPStore:
    """The store of a process that listens; a RuntimeError if none does for ``timeout_s``."""
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


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
    store: dist.Store | None = None,
) -> dist.ProcessGroup:
    """The group of ``world_size`` processes; rank 0 hosts the store at ``host:port``.

    gloo returns once all have joined; ``timeout_s`` is for that and for each collective. NCCL makes
    its communicator in the first collective, so it returns at once. With ``device`` it makes it
    here, and waits for the others without a limit: only where all of them give one (SGLang does
    not). Ranks are those within the group, also as ``src`` and ``dst``. With ``store`` (of
    ``listen`` or ``connect``) that one is used. Raises torch.distributed.DistError (a RuntimeError)
    when somebody is missing.
    """
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        open_store = listen if rank == 0 else connect
        store = open_store(host, port=port, timeout_s=timeout_s)
    store.set_timeout(timeout)
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


def use(device: torch.device) -> None:
    """Make a CUDA device this thread's; a new thread's is the first, which may be another rank's.

    NCCL's batched sends hang where the present device is not that of their tensors.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def leave_unused(joined: "Future[dist.ProcessGroup]") -> None:
    """End a group that was made after it was given up; to be called when ``joined`` is done."""
    if joined.exception() is None:
        leave(joined.result())


def leave(group: Any) -> None:
    """End this process's part of the group, its threads and sockets."""
    dist.destroy_process_group(group)
