"""One execution from start to end, as the worker keeps watch over it.

    worker --- script --- whatever it starts

The worker is the first process of its namespace, which no signal from within can end or stop. The
script reads its code by itself and gives up its rights before it runs it. When it has ended, or has
to be ended, all that is left in the namespace is killed. Output passes through buffers that are
wiped, so that the next script, a copy of the worker, finds nothing of it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import struct
import time
from typing import Any

from megatron_spear.envs.sandbox.inside import jail, program

ENDED, TIMEOUT, MEMORY, OUTPUT, FAULT = range(5)
"""Why an execution was over: by itself, or stopped for a reason; ``FAULT``: it never began."""
ANSWER = struct.Struct("<BidQQII")
"""Reason, wait status, seconds, bytes written to stdout and stderr, bytes of each that follow."""
SIZE = struct.Struct("<I")
"""Before each piece of code, and before the word at the start ("" = ready)."""

_LOOK_S = 0.05
_CHUNK = 65536
_MAX_OUTPUT = 16 << 20
_MAX_FAULT = 1000
_BEGUN = b"B"


class Output:
    """The first (or the last) ``keep`` bytes of what comes from a pipe, and how many came."""

    def __init__(self, keep: int, *, last: bool) -> None:
        self.pipe, self.total = -1, 0
        self._keep, self._last, self._filled = keep, last, 0
        self._buffer = bytearray(keep + _CHUNK)
        self._view = memoryview(self._buffer)

    def begin(self, pipe: int) -> None:
        """Read from this pipe from now on."""
        self.pipe, self.total, self._filled = pipe, 0, 0
        os.set_blocking(pipe, False)

    def read(self) -> bool:
        """Take what is there; False once there is nothing (more, or yet)."""
        try:
            size = os.readv(self.pipe, [self._view[self._filled : self._filled + _CHUNK]])
        except BlockingIOError:
            return False
        self.total += size
        self._filled += size
        over = self._filled - self._keep
        if over > 0:
            if self._last:
                self._view[: self._keep] = self._view[over : self._filled]
            self._filled = self._keep
        return size > 0

    @property
    def held(self) -> memoryview:
        """What is kept."""
        return self._view[: self._filled]

    def wipe(self) -> None:
        """Close the pipe and forget what was held."""
        os.close(self.pipe)
        size = min(self.total, len(self._buffer))
        self._view[:size] = bytes(size)


class Keeper:
    """Runs one piece of code after the other. ``control`` gives the code, ``answers`` takes what
    came of it."""

    def __init__(self, config: dict[str, Any], control: int, answers: int) -> None:
        self._config, self._control, self._answers = config, control, answers
        self._number = 0
        keep = config["keep_bytes"]
        self._out, self._err = Output(keep, last=False), Output(keep, last=True)
        self._told = Output(_MAX_FAULT, last=False)

    def execute(self) -> bool:
        """Run the code that is to be read from ``control``; False where no other can follow."""
        config, outputs = self._config, (self._out, self._err, self._told)
        self._number += 1
        folder = "/tmp" if config["jailed"] else f"{config['folder']}/{os.getpid()}-{self._number}"
        pipes = [os.pipe() for _ in outputs]
        began = time.monotonic()
        try:
            script = os.fork()
        except OSError as error:
            why = f"fork: {error}".encode()
            send(self._answers, ANSWER.pack(FAULT, 0, 0.0, 0, len(why), 0, len(why)) + why)
            return False
        if script == 0:
            _become_script(config, self._control, folder, [write for _, write in pipes])
        for output, (read, write) in zip(outputs, pipes):  # noqa: B905 - Python 3.8
            os.close(write)
            output.begin(read)
        reason, status = FAULT, 0
        try:
            reason = self._watch(script, began + config["timeout_s"])
        finally:
            os.kill(script, signal.SIGKILL)
            _, status = os.waitpid(script, 0)
            end_all(config)
        time_s = time.monotonic() - began
        for output in outputs:
            while output.total < 2 * _MAX_OUTPUT and output.read():
                pass
        begun = bytes(self._told.held) == _BEGUN
        self._answer(reason if begun or reason != ENDED else FAULT, status, time_s)
        for output in outputs:
            output.wipe()
        if not config["jailed"]:
            shutil.rmtree(folder, ignore_errors=True)
        return begun

    def _answer(self, reason: int, status: int, time_s: float) -> None:
        err = self._told if reason == FAULT else self._err
        sizes = (self._out.total, err.total, len(self._out.held), len(err.held))
        send(self._answers, ANSWER.pack(reason, status, time_s, *sizes))
        send(self._answers, self._out.held)
        send(self._answers, err.held)

    def _watch(self, script: int, deadline: float) -> int:
        """Read until the script has ended or has to be ended; gives the reason. EOFError where
        ``control`` is closed: then nobody waits for the answer."""
        by_pipe = {output.pipe: output for output in (self._out, self._err)}
        ended = jail.process_file(script)
        poller = select.poll()
        for pipe in (*by_pipe, ended):
            poller.register(pipe, select.POLLIN)
        poller.register(self._control, 0)  # tells that it was closed, nothing else
        look_at = time.monotonic() + _LOOK_S
        try:
            while True:
                now = time.monotonic()
                if now >= deadline:
                    return TIMEOUT
                if now >= look_at:
                    look_at = now + _LOOK_S
                    if self._config["jailed"] and _memory_in_use() > self._config["memory_bytes"]:
                        return MEMORY
                if self._out.total + self._err.total > _MAX_OUTPUT:
                    return OUTPUT
                ready = [p for p, _ in poller.poll(1000 * min(look_at - now, deadline - now) + 1)]
                if ended in ready:
                    return ENDED
                for pipe in ready:
                    if pipe == self._control:
                        raise EOFError("nobody waits for the answer")
                    before = by_pipe[pipe].total
                    by_pipe[pipe].read()
                    if by_pipe[pipe].total == before:
                        poller.unregister(pipe)  # nobody can write to it; the script may go on
        finally:
            os.close(ended)


def _memory_in_use() -> int:
    """Bytes of memory that the script and what it started hold."""
    total, ours = 0, str(os.getpid())
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == ours:
            continue
        try:
            with open(f"/proc/{name}/status", "rb") as file:
                lines = file.read().split(b"\n")
        except OSError:
            continue  # it has just ended
        held = [line.split()[1] for line in lines if line.startswith((b"RssAnon:", b"RssShmem:"))]
        total += 1024 * sum(map(int, held))
    return total


def end_all(config: dict[str, Any]) -> None:
    """End all that scripts have started; returns when it is gone.

    In a namespace, whose first process we are, that is every process but us. Otherwise it is our
    children: what loses its parent becomes ours, in both cases.
    """
    while True:
        with contextlib.suppress(ProcessLookupError):
            if config["jailed"]:
                os.kill(-1, signal.SIGKILL)
            else:
                for pid in _children():
                    os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Our children, orphans that we adopted among them."""
    found, own = [], str(os.getpid()).encode()
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[1] == own:
                    found.append(int(name))
        except (OSError, IndexError, ValueError):
            continue  # no process, or none any more
    return found


def _become_script(config: dict[str, Any], control: int, folder: str, writes: list[int]) -> None:
    """Take the code, shut ourselves in, run it. Nothing returns from here."""
    out, err, told = writes
    try:
        (size,) = SIZE.unpack(take(control, SIZE.size))
        code = take(control, size)
        os.setsid()
        _forget_signals()
        for source, target in ((out, 1), (err, 2)):  # 0 is /dev/null already
            os.dup2(source, target)
        if config["jailed"]:
            jail.new_mounts(config["disk_bytes"])
        else:
            os.mkdir(folder, 0o700)
        os.chdir(folder)
        jail.limit(config)
        if config["jailed"]:
            jail.give_up_rights()
            jail.filter_calls(config["call_filter"])
        os.write(told, _BEGUN)
        os.closerange(3, 4096)
    except BaseException as error:  # noqa: BLE001 - told to the other side, which raises it
        os.write(told, f"{type(error).__name__}: {error}".encode()[:_MAX_FAULT])
        os._exit(1)
    jail.be_readable()
    try:
        program.run_as_script(code)
    finally:  # whatever the script has made of what we use: this copy of the worker ends here
        program.exit_at_once(1)


def _forget_signals() -> None:
    """Signals do what they do in a script that a shell starts: an environment worker ignores some,
    which we have inherited."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def take(pipe: int, size: int) -> bytes:
    """Exactly ``size`` bytes; EOFError where it closes before."""
    data = bytearray()
    while len(data) < size:
        part = os.read(pipe, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError("the control pipe was closed")
        data += part
    return bytes(data)


def send(pipe: int, data: bytes | memoryview) -> None:
    """All of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]
