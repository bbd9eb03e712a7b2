"""Run a function on several gloo ranks of this machine and collect what each returns.

The ranks are forked from a server that has imported the policy once, so starting them is cheap.
"""

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

PRELOADED = (
    "megatron_spear.policy.policy",
    "megatron.core.dist_checkpointing.strategies.torch",  # these two the policy imports when used
    "transformers.models.auto.modeling_auto",
    "pytest",  # the modules with the functions to run import it
)


class RankFailed(RuntimeError):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    fake_te: bool = False,
) -> list[Any]:
    """``function(*args)`` on ``world_size`` processes; their results in rank order.

    ``function`` must be importable (a module's top level), ``args`` and results picklable. Each
    process has the environment torchrun gives it (RANK, WORLD_SIZE, MASTER_ADDR, ...) and one
    thread. With ``fake_te`` they are new processes that have the stand-in for TransformerEngine
    (``testing.fake_te``), which takes some seconds. Raises RankFailed with the first failing rank's
    traceback, or naming the ranks that were not done after ``timeout_s`` seconds; all processes are
    killed then.
    """
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("spawn") if fake_te else fork_context()
    # Bound here, as torchrun does: a port that was only looked up may be taken before rank 0 binds.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], {}
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        payload = pickle.dumps((function, args))
        process = context.Process(
            target=_rank_main, args=(sender, environment, payload, fake_te), daemon=True
        )
        process.start()
        sender.close()
        processes.append(process)
        pipes[receiver] = rank
    try:
        return _collect(pipes, world_size, timeout_s)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _collect(pipes: dict[Any, int], world_size: int, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while pipes:
        ready = wait(list(pipes), timeout=max(deadline - time.monotonic(), 0.0))
        if not ready:
            late = ", ".join(map(str, sorted(pipes.values())))
            raise RankFailed(f"ranks {late} of {world_size} did not finish in {timeout_s} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                done, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankFailed(f"rank {rank} of {world_size} died without a word") from None
            if not done:
                raise RankFailed(f"rank {rank} of {world_size} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(world_size)]


def _rank_main(
    sender: Connection, environment: dict[str, str], payload: bytes, fake_te: bool
) -> None:
    os.environ.update(environment)
    gc.freeze()  # what was imported before the fork stays; looking at it would copy its pages
    import torch

    if fake_te:
        from megatron_spear.testing.fake_te import install

        install()

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(payload)
        message = (True, function(*args))
    except BaseException:  # noqa: BLE001  (reported to the parent, whatever it is)
        message = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    sender.close()
    os._exit(0)  # no atexit work: other ranks may be gone already


def fork_context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context
