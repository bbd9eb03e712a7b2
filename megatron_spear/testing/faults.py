"""Faults for tests: ranks that end one by one, each in its own way, and files that get damaged.

Nothing in the package looks for these; a test's own function on a rank brings its fault along.
"""

import contextlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_spear.testing.ranks import fork_context

KILLED = -signal.SIGKILL


class Rank:
    """One rank's process: its exit status, and what it wrote to stderr."""

    def __init__(self, process: BaseProcess, stderr: Path) -> None:
        self._process, self._stderr = process, stderr

    @property
    def err(self) -> str:
        """All of its stderr so far, also what was written past Python."""
        return self._stderr.read_text(errors="replace") if self._stderr.is_file() else ""

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self, limit_s: float) -> int | None:
        """``status`` once it has ended, or after ``limit_s`` seconds."""
        self._process.join(limit_s)
        return self.status

    def until_it_says(self, text: str, limit_s: float) -> None:
        """Wait for a text in its stderr; AssertionError if it ends or the time is over before."""
        until = time.monotonic() + limit_s
        while text not in self.err:
            assert self.status is None, f"ended with {self.status}:\n{self.err}"
            assert time.monotonic() < until, f"not said within {limit_s} s: {text}\n{self.err}"
            time.sleep(0.02)


@contextlib.contextmanager
def ranks_that_may_fail(
    function: Callable[..., None], world_size: int, folder: Path, *args: Any
) -> Iterator[list[Rank]]:
    """``function(*args)`` on ``world_size`` gloo ranks, as ``run_ranks`` starts them.

    A rank that raises prints its traceback and exits 1; nobody ends because another one did. What
    still runs at the end of the block is killed.
    """
    from torch.distributed import TCPStore

    context = fork_context()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(parents=True, exist_ok=True)
    payload, ranks, processes = pickle.dumps((function, args)), [], []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        stderr = folder / f"rank_{rank}.err"
        process = context.Process(
            target=_run_one, args=(payload, environment, str(stderr)), daemon=True
        )
        process.start()
        processes.append(process)
        ranks.append(Rank(process, stderr))
    try:
        yield ranks
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run_one(payload: bytes, environment: dict[str, str], stderr: str) -> None:
    os.environ.update(environment)
    file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import torch

    torch.set_num_threads(1)
    function, args = pickle.loads(payload)
    function(*args)


def sleep_for_ever(*args: Any, **kwargs: Any) -> None:
    """What a hung call does."""
    while True:
        time.sleep(3600.0)


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Within the block the attribute is another one."""
    original = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, original)


def flip_bit(file: Path, at: int) -> None:
    """Flip the lowest bit of the byte at this offset; negative ones count from the end."""
    with file.open("rb+") as stream:
        stream.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        where, byte = stream.tell(), stream.read(1)
        assert byte, f"{file} has no byte {at}"
        stream.seek(where)
        stream.write(bytes([byte[0] ^ 1]))
