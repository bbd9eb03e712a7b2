"""A warm worker as its owner sees it: start it, give it code, end it. Every wait has a deadline."""

import functools
import importlib.util
import json
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.envs.sandbox.bubblewrap import VARIABLES, Start
from megatron_spear.envs.sandbox.inside.keeper import ANSWER, SIZE
from megatron_spear.errors import EnvironmentFault

log = logging.getLogger(__name__)

START_DEADLINE_S = 60.0
_END_S = 2.0
_INSIDE = "megatron_spear.envs.sandbox.inside"
_MODULES = ("program", "jail", "keeper", "worker")
_MAX_WORD = 4096

BOOT = f"""
import json, os, sys, types
def take(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            sys.exit(0)
        data += part
    return data
sys.path[:] = [folder for folder in sys.path if folder]
sent = json.loads(take(int.from_bytes(take(4), "little")).decode())
for name in sent["packages"]:
    sys.modules[name] = types.ModuleType(name)
for name, source in sent["sources"]:
    full = "{_INSIDE}." + name
    module = sys.modules[full] = types.ModuleType(full)
    setattr(sys.modules["{_INSIDE}"], name, module)
    exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
sys.modules["{_INSIDE}.worker"].main(sent["config"])
"""
"""What the interpreter is started with; the rest comes through its input."""


class WorkerLost(Exception):
    """The worker ended, or answered what is no answer; says which."""


class NoAnswer(WorkerLost):
    """The worker is there and does not answer in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the keeper tells of an execution (``inside.keeper``)."""

    reason: int
    wait_status: int
    time_s: float
    num_stdout_bytes: int
    num_stderr_bytes: int
    stdout: bytes
    stderr: bytes


def arguments() -> list[str]:
    """What an interpreter is started with to be a worker."""
    return ["-s", "-B", "-X", "utf8", "-c", BOOT]


class WarmWorker:
    """A started worker, ready to run code. Raises EnvironmentFault where it cannot be started."""

    def __init__(self, start: Start, config: Mapping[str, Any]) -> None:
        self._keep_bytes = int(config["keep_bytes"])
        rights: dict[str, Any] = {}
        if start.uid is not None:
            rights = {"user": start.uid, "group": start.uid, "extra_groups": []}
        try:
            self._process = subprocess.Popen(
                start.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=VARIABLES,
                cwd="/",
                start_new_session=True,
                **rights,
            )
        except OSError as error:
            raise EnvironmentFault(
                f"the sandbox cannot start {start.command[0]}: {error}"
            ) from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._control, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._control, self._answers, self._process.stderr):
            os.set_blocking(pipe.fileno(), False)
        self._begin(config)

    @property
    def pid(self) -> int:
        """The process that was started; all others of the worker end with it."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it is there."""
        return self._process.poll() is None

    def execute(self, code: bytes, wait_s: float) -> Answer:
        """Run code. Raises WorkerLost where the worker ends, NoAnswer after ``wait_s``; it is of no
        use then, as after any other exception."""
        deadline = time.monotonic() + wait_s
        self._send(SIZE.pack(len(code)) + code, deadline)
        reason, status, time_s, *totals, num_out, num_err = ANSWER.unpack(
            self._take(ANSWER.size, deadline)
        )
        if max(num_out, num_err) > max(self._keep_bytes, _MAX_WORD):
            raise WorkerLost(f"it announced outputs of {num_out} and {num_err} bytes")
        stdout, stderr = self._take(num_out, deadline), self._take(num_err, deadline)
        return Answer(reason, status, time_s, totals[0], totals[1], stdout, stderr)

    def end(self) -> None:
        """End it and all that it started."""
        self._control.close()  # it ends by itself then, and takes what it started with it
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._until_all_ended()
        for pipe in (self._answers, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def _begin(self, config: Mapping[str, Any]) -> None:
        """Send the sources and wait for the word that it is ready."""
        deadline = time.monotonic() + START_DEADLINE_S
        sent = json.dumps({**_sources(), "config": dict(config)}).encode()
        try:
            self._send(SIZE.pack(len(sent)) + sent, deadline)
            (size,) = SIZE.unpack(self._take(SIZE.size, deadline))
            word = self._take(min(size, _MAX_WORD), deadline).decode("utf-8", "replace")
        except WorkerLost as lost:
            said = self._last_words()
            self.end()
            raise EnvironmentFault(f"the sandbox's worker cannot start: {said or lost}") from lost
        except BaseException:
            self.end()
            raise
        if word:
            self.end()
            raise EnvironmentFault(f"the sandbox's worker cannot start: {word}")

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._control.fileno(), select.POLLOUT, deadline)
            try:
                view = view[os.write(self._control.fileno(), view) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WorkerLost(self._fate()) from error

    def _take(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._answers.fileno(), select.POLLIN, deadline)
            part = self._answers.read(size - len(data))
            if part is None:
                continue
            if not part:
                raise WorkerLost(self._fate())
            data += part
        return bytes(data)

    def _wait(self, file: int, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(file, event)
        if not poller.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise NoAnswer("no answer in time")

    def _fate(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        return f"it ended with status {self._process.returncode}"

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        said = self._process.stderr.read(_MAX_WORD) or b""
        return said.decode("utf-8", "replace").strip()

    def _until_all_ended(self) -> None:
        """Wait until nobody holds the other end of the answers, which all processes but the code's
        own do: with a namespace's first process, the others end a moment later."""
        deadline = time.monotonic() + _END_S
        with suppress(NoAnswer):
            while True:
                self._wait(self._answers.fileno(), select.POLLIN, deadline)
                if self._answers.read(65536) == b"":
                    return
        log.warning("processes of a sandbox are still there %.0f s after its end", _END_S)


@functools.cache
def _sources() -> dict[str, Any]:
    """The modules of ``inside``, and the names of the packages that they are in."""
    parts = _INSIDE.split(".")
    sources = []
    for name in _MODULES:
        spec = importlib.util.find_spec(f"{_INSIDE}.{name}")
        assert spec is not None and spec.origin is not None
        sources.append((name, Path(spec.origin).read_text(encoding="utf-8")))
    packages = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return {"packages": packages, "sources": sources}
