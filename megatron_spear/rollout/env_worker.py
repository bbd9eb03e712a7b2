"""The program of one environment worker: many environments, one after the other, over one socket.

Started by ``env_link`` as ``python -c "...main()" SOCKET NOTE PARENT_PID``, so the parent's main
module is not imported again and torch never is. The first frame (call id 0) is ``(factory,
options)``; the worker answers it when it is ready. Every further frame is ``(operation, slot,
arguments)`` and gets one frame ``(True, value)`` or ``(False, message)`` back. The note, a file
that both sides hold open, says which call is being served: the one to blame if it never returns.
"""

import contextlib
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_spear.envs.protocol import TextEnvironment
from megatron_spear.errors import describe
from megatron_spear.rollout.env_frames import READ_BYTES, FrameReader, pack
from megatron_spear.user_code import load_callable

HELLO = 0
_FLUSH_S = 0.02
_PARENT_POLL_S = 1.0
_NOTE = struct.Struct("<Q")


def write_note(file: int, call_id: int) -> None:
    """Note the call about to be served; ``HELLO`` for none."""
    os.pwrite(file, _NOTE.pack(call_id), 0)


def read_note(file: int) -> int:
    """The call being served, or ``HELLO``."""
    found = os.pread(file, _NOTE.size, 0)
    return _NOTE.unpack(found)[0] if found else HELLO


def load_factory(name: str) -> Callable[..., TextEnvironment]:
    """The callable named ``package.module:callable`` or ``FILE.py:callable``.

    Raises ConfigError.
    """
    factory: Callable[..., TextEnvironment] = load_callable(name, f"environment factory {name!r}")
    return factory


class _Host:
    """The environments of this worker by slot number; made when first reset."""

    def __init__(self, factory: str, options: Mapping[str, Any]) -> None:
        self._make = load_factory(factory)
        self._options = dict(options)
        self._environments: dict[int, TextEnvironment] = {}

    def call(self, operation: str, slot: int, arguments: tuple[Any, ...]) -> Any:
        """Do one operation; an environment that raises is replaced at its next reset."""
        try:
            if operation == "reset":
                seed, options = arguments
                if slot not in self._environments:
                    self._environments[slot] = self._make(**self._options)
                return self._environments[slot].reset(seed=seed, options=options)
            if slot not in self._environments:
                raise RuntimeError("step on an environment that was never reset")
            return self._environments[slot].step(*arguments)
        except BaseException:
            self._drop(slot)
            raise

    def close(self) -> None:
        """Close every environment."""
        for slot in list(self._environments):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        environment = self._environments.pop(slot, None)
        if environment is not None:
            with contextlib.suppress(Exception):
                environment.close()


def main() -> None:
    """Serve until the socket closes; exits as well when the parent is gone."""
    descriptor, note, parent = map(int, sys.argv[1:])
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
    with socket.socket(fileno=descriptor) as channel:
        _serve(channel, note)


def _serve(channel: socket.socket, note: int) -> None:
    reader, host = FrameReader(), None
    try:
        while data := channel.recv(READ_BYTES):
            replies, flushed = bytearray(), time.monotonic()
            for call_id, payload in reader.feed(data):
                if call_id == HELLO:
                    host, reply = _start(payload)
                else:
                    write_note(note, call_id)
                    reply = _answer(host, call_id, payload)
                replies += reply
                # Slow environments report one by one, which the pool counts as progress.
                if time.monotonic() - flushed > _FLUSH_S:
                    channel.sendall(replies)
                    replies, flushed = bytearray(), time.monotonic()
            write_note(note, HELLO)
            channel.sendall(replies)
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        if host is not None:
            host.close()


def _start(payload: bytes) -> tuple[_Host | None, bytes]:
    try:
        host = _Host(*pickle.loads(payload))
    except Exception as error:  # noqa: BLE001 - reported to the pool, which raises it
        return None, pack(HELLO, (False, describe(error)))
    return host, pack(HELLO, (True, os.getpid()))


def _answer(host: _Host | None, call_id: int, payload: bytes) -> bytes:
    try:
        assert host is not None, "the pool sends calls to ready workers only"
        return pack(call_id, (True, host.call(*pickle.loads(payload))))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - costs this one call, reported to it
        return pack(call_id, (False, describe(error)))


def exit_with_parent(parent: int) -> None:
    """Ends the process when its parent is gone, even in the middle of a hung environment call."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)
