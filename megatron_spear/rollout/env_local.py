"""An environment worker as a child process of this one, over a socket pair."""

import contextlib
import os
import socket
import subprocess
import sys
from concurrent.futures import Future
from typing import NamedTuple

from megatron_spear.rollout.env_worker import read_note

_PROGRAM = "from megatron_spear.rollout.env_worker import main; main()"
_THREAD_LIMITS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Ending(NamedTuple):
    """How a worker ended, in words, and the call that it was busy with (``HELLO``: none)."""

    fate: str
    blamed: int


def start_worker(channel: socket.socket, note: int) -> "subprocess.Popen[bytes]":
    """Start a worker that serves ``channel`` and writes its notes into the file ``note``."""
    paths = [os.path.abspath(p) for p in sys.path if p]
    files = [channel.fileno(), note]
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *map(str, [*files, os.getpid()])],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=files,
        env={**os.environ, **_THREAD_LIMITS, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )


def make_note() -> int:
    """A file in memory for a worker's notes, which outlives the worker."""
    return os.memfd_create("environment-worker-note")


class LocalWorker:
    """A worker process of our own. See ``env_link.FarEnd``."""

    def __init__(self) -> None:
        note = make_note()
        self._note: int | None = note
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = start_worker(theirs, note)
        ours.setblocking(False)
        self._channel = ours
        self.channel: Future[socket.socket] = Future()
        self.channel.set_result(ours)

    def gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def kill(self) -> Ending:
        """End the process now."""
        assert self._note is not None, "a worker ends once"
        self._kill()
        ending = Ending(f"exit status {self._process.returncode}", read_note(self._note))
        self._forget_note()
        return ending

    def close(self, wait_s: float) -> None:
        """Let the process close its environments for ``wait_s``, then end it."""
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=wait_s)
        self._kill()
        self._forget_note()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)

    def _forget_note(self) -> None:
        if self._note is not None:
            os.close(self._note)
            self._note = None
