"""An environment worker on another machine: a connection to an environment server.

The server (``env_server``) starts one worker process for each connection and hands it the socket.
Where that worker is to be found is asked anew for each connection, since a server that was started
again may have another address.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_spear.rollout.env_handshake import prove_to_server
from megatron_spear.rollout.env_local import Ending
from megatron_spear.rollout.env_worker import HELLO

_LOOK_S = 0.2
_NO_LINGER = struct.pack("ii", 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteWorkers:
    """How to reach the environment workers of other machines.

    ``address(i)`` gives ``host:port`` of worker i, None while it has none; it is called in a thread
    and may read files. ``connect_s`` bounds the wait for an address and a connection,
    ``handshake_s`` one try.
    """

    address: Callable[[int], str | None]
    secret: bytes
    connect_s: float = 45.0
    handshake_s: float = 10.0


class RemoteWorker:
    """The connection to worker ``index``, which is made in a thread. See ``env_link.FarEnd``."""

    def __init__(self, workers: RemoteWorkers, index: int) -> None:
        self._workers = workers
        self._index = index
        self._given_up = threading.Event()
        self._lock = threading.Lock()
        self.channel: Future[socket.socket] = Future()
        name = f"connect-environment-{index}"
        threading.Thread(target=self._open, name=name, daemon=True).start()

    def gone(self) -> bool:
        """Whether the server, or the system it ran on, has closed the connection."""
        channel = self._connected()
        return channel is not None and _hung_up(channel)

    def kill(self) -> Ending | None:
        """Have the server end the worker; it answers with a frame that says how it ended. None is
        needed before there is a connection."""
        with self._lock:
            self._given_up.set()
        channel = self._connected()
        if channel is None:
            return Ending("never connected", HELLO)
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_WR)
        return None

    def close(self, wait_s: float) -> None:
        """Leave; the server sees to the worker. After ``kill`` nothing is waited for: what was not
        sent is thrown away, so that a worker that does not read does not keep the rest waiting."""
        with self._lock:
            abandoned = self._given_up.is_set()
            self._given_up.set()
        channel = self._connected()
        if channel is not None:
            if abandoned:
                with contextlib.suppress(OSError):
                    channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            channel.close()

    def _connected(self) -> socket.socket | None:
        done = self.channel.done() and self.channel.exception() is None
        return self.channel.result() if done else None

    def _open(self) -> None:
        """Ask for the address and connect, again and again until it is done or too late."""
        deadline = time.monotonic() + self._workers.connect_s
        problem = "it is not registered"
        while not self._given_up.is_set():
            try:
                address = self._workers.address(self._index)
                if address is not None:
                    problem = address
                    self._deliver(self._connect(address))
                    return
            except (OSError, ValueError) as error:
                problem = f"{problem}: {error}"
            if time.monotonic() >= deadline:
                self.channel.set_exception(
                    ConnectionError(f"not reached in {self._workers.connect_s:g} s ({problem})")
                )
                return
            self._given_up.wait(_LOOK_S)

    def _connect(self, address: str) -> socket.socket:
        host, _, port = address.rpartition(":")
        limit_s = self._workers.handshake_s
        channel = socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s)
        try:
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            prove_to_server(channel, self._workers.secret, limit_s)
            channel.setblocking(False)
        except BaseException:
            channel.close()
            raise
        return channel

    def _deliver(self, channel: socket.socket) -> None:
        with self._lock:
            if self._given_up.is_set():
                channel.close()
            else:
                self.channel.set_result(channel)


def _hung_up(channel: socket.socket) -> bool:
    if channel.fileno() < 0:
        return True
    poller = select.poll()
    poller.register(channel, select.POLLRDHUP)
    return bool(poller.poll(0))
