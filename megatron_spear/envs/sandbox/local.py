"""Runs code on this machine, in warm workers: shut in by bubblewrap, or as plain processes."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_spear.envs.sandbox.bubblewrap import (
    Start,
    find_bubblewrap,
    shut_in,
    user_without_rights,
)
from megatron_spear.envs.sandbox.execution import Execution, Status, beginning, end, refusal
from megatron_spear.envs.sandbox.inside import keeper
from megatron_spear.envs.sandbox.inside.program import OUT_OF_MEMORY
from megatron_spear.envs.sandbox.interpreter import Interpreter, find_interpreter, open_to_all
from megatron_spear.envs.sandbox.system_calls import call_filter
from megatron_spear.envs.sandbox.warm_worker import (
    Answer,
    NoAnswer,
    WarmWorker,
    WorkerLost,
    arguments,
)
from megatron_spear.errors import EnvironmentFault

log = logging.getLogger(__name__)

COMMON_MODULES = (
    "collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "json",
    "math", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
"""What much code imports; it is there already when an execution begins."""

GRACE_S = 10.0
"""How long an answer may be late before the worker is taken for broken."""

_BYTES_PER_CHAR = 4
_MIB = 1 << 20
_STOPPED: dict[int, tuple[Status, str]] = {
    keeper.TIMEOUT: ("timeout", "stopped after {timeout_s:g} s"),
    keeper.MEMORY: ("memory", "stopped: its processes held more than {memory_mb} MB"),
    keeper.OUTPUT: ("killed", "stopped: it wrote too much output"),
}


class LocalSandbox:
    """``workers`` pieces of code at a time, each for at most ``timeout_s`` of wall-clock time and
    of CPU time; more of them wait for their turn.

    A worker is started when it is first needed, and anew where it has ended.
    """

    def __init__(
        self,
        *,
        python: str | None,
        jailed: bool,
        workers: int,
        timeout_s: float,
        memory_mb: int,
        disk_mb: int,
        max_processes: int,
        max_output_chars: int,
        preload: Sequence[str],
    ) -> None:
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._max_chars = max_output_chars
        self._jailed = jailed
        self._interpreter = find_interpreter(python)
        self._disk_bytes = disk_mb * _MIB
        self._folder: str | None = None
        self._config = {
            "jailed": jailed,
            "timeout_s": timeout_s,
            "memory_bytes": memory_mb * _MIB,
            "disk_bytes": self._disk_bytes,
            "max_processes": max_processes,
            "keep_bytes": max_output_chars * _BYTES_PER_CHAR,
            "preload": [*COMMON_MODULES, *preload],
            "call_filter": call_filter().hex() if jailed else "",
        }
        self._idle: list[WarmWorker] = []
        self._free = threading.Semaphore(workers)
        self._lock = threading.Lock()
        self._closed = False
        # bubblewrap ends with the thread that started it, so one thread starts all of them.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox-start")

    def run(self, code: str) -> Execution:
        """Run code; see ``execution.Sandbox``."""
        if (refused := refusal(code)) is not None:
            return refused
        with self._free:
            for _ in range(2):
                try:
                    answer = self._execute(code.encode("utf-8"))
                except NoAnswer:
                    log.warning("a worker of the sandbox hung and was replaced")
                    return Execution("", "stopped: no answer", "timeout", self._timeout_s)
                except WorkerLost as lost:
                    log.warning("a worker of the sandbox was lost: %s; it is replaced", lost)
                    continue
                return self._read(answer)
        return Execution("", "the worker that ran this code ended, twice", "killed", 0.0)

    def close(self) -> None:
        """End all workers. What is running is still answered."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()
        self._starter.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _execute(self, code: bytes) -> Answer:
        with self._worker() as worker:
            return worker.execute(code, self._timeout_s + GRACE_S)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[WarmWorker]:
        """A worker for one execution; it goes back, unless anything was raised meanwhile."""
        with self._lock:
            if self._closed:
                raise EnvironmentFault("the sandbox was closed")
            worker = self._idle.pop() if self._idle else None
        if worker is not None and not worker.alive:
            worker.end()
            worker = None
        if worker is None:
            worker = self._starter.submit(self._start).result()
        try:
            yield worker
        except BaseException:
            worker.end()
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.end()

    def _start(self) -> WarmWorker:
        if self._jailed:
            bwrap = find_bubblewrap()
            if bwrap is None:
                raise EnvironmentFault("the sandbox cannot start: bubblewrap is gone")
            start = shut_in(bwrap, self._interpreter, arguments(), self._disk_bytes)
            return WarmWorker(start, self._config)
        start = plain(self._interpreter)
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="spear-unsafe-")
            if start.uid is not None:
                os.chown(self._folder, start.uid, start.uid)
        return WarmWorker(start, {**self._config, "folder": self._folder})

    def _read(self, answer: Answer) -> Execution:
        if answer.reason == keeper.FAULT:
            raise EnvironmentFault(
                f"the sandbox cannot run code: {answer.stderr.decode('utf-8', 'replace')}"
            )
        stdout = beginning(answer.stdout, answer.num_stdout_bytes, self._max_chars)
        stderr = end(answer.stderr, answer.num_stderr_bytes, self._max_chars)
        if answer.reason in _STOPPED:
            status, words = _STOPPED[answer.reason]
            note = words.format(timeout_s=self._timeout_s, memory_mb=self._memory_mb)
        else:
            status, note = _fate(answer.wait_status, stderr)
        if note:
            stderr = f"{stderr.rstrip()}\n{note}".lstrip()
        return Execution(stdout, stderr, status, answer.time_s)


def plain(interpreter: Interpreter) -> Start:
    """The interpreter as a plain process; root becomes a user without rights where that user can
    run it."""
    uid = user_without_rights()
    places = (interpreter.program, *interpreter.folders)
    command = (interpreter.program, *arguments())
    return Start(command, uid if all(map(open_to_all, places)) else None)


def _fate(wait_status: int, stderr: str) -> tuple[Status, str]:
    """Status, and what to add to stderr, of a script that ended by itself."""
    if os.WIFEXITED(wait_status):
        code = os.WEXITSTATUS(wait_status)
        note = f"exit status {code}" if code and not stderr else ""
        return ("error" if code else "ok"), note
    number = os.WTERMSIG(wait_status)
    if number == OUT_OF_MEMORY:
        return "memory", ""
    if number == signal.SIGXCPU:
        return "timeout", "stopped: out of CPU time"
    names: Callable[[int], str] = lambda n: signal.Signals(n).name  # noqa: E731
    return "killed", f"ended by {names(number) if number in _SIGNALS else f'signal {number}'}"


_SIGNALS = frozenset(map(int, signal.Signals))
