"""The program of an environment server: a worker process for each connection of a pool.

    python -m megatron_spear.rollout.env_server --host H --address-file FILE --secret-file FILE

    pool --connects, handshake--> server --socket, note--> worker     frames go to and fro directly
    pool --shuts its side (a call hangs), or is gone--> server        the worker is ended
    worker ends --> server sends one last frame: how, and the call it was busy with

It listens at a free port and writes its address into a file once it does. It unpickles nothing:
after the handshake the worker has the socket, and the server only looks whether either side ends.
Workers end when the server does (``env_worker.exit_with_parent``).
"""

import argparse
import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_spear.errors import ConfigError
from megatron_spear.files import write_whole
from megatron_spear.rollout.env_frames import ENDED, pack
from megatron_spear.rollout.env_handshake import prove_to_pool, read_secret
from megatron_spear.rollout.env_local import make_note, start_worker
from megatron_spear.rollout.env_worker import read_note

log = logging.getLogger(__name__)

_HANDSHAKE_S = 10.0
_CLOSE_S = 1.0
_LAST_WORD_S = 2.0
_MAX_STRANGERS = 64
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
"""A pool's machine that is gone without a word is noticed after a minute."""


class EnvironmentServer:
    """Serves connections at a free port of ``host``, an address or a name of this machine."""

    def __init__(self, host: str, secret: bytes) -> None:
        self._secret = secret
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self._handshakes = threading.BoundedSemaphore(_MAX_STRANGERS)

    @property
    def port(self) -> int:
        """The port it listens at."""
        port: int = self._listener.getsockname()[1]
        return port

    def serve(self) -> None:
        """Take connections, for ever."""
        while True:
            self._handshakes.acquire()
            try:
                channel, peer = self._listener.accept()
            except OSError as error:  # too many open files, or a caller that is gone already
                self._handshakes.release()
                log.warning("a connection could not be taken: %s", error)
                time.sleep(0.1)
                continue
            threading.Thread(target=self._take, args=(channel, peer[0]), daemon=True).start()

    def _take(self, channel: socket.socket, peer: str) -> None:
        with channel:
            try:
                prove_to_pool(channel, self._secret, _HANDSHAKE_S)
            except OSError as error:
                log.warning("%s was sent away: %s", peer, error)
                return
            finally:
                self._handshakes.release()
            try:
                _run_worker(channel, peer)
            except OSError as error:  # no memory or no file left for a worker
                log.warning("no worker for %s: %s", peer, error)


def _run_worker(channel: socket.socket, peer: str) -> None:
    """Start a worker with this socket; returns when it has ended and the pool was told."""
    channel.settimeout(None)  # the worker's socket is the same one
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        channel.setsockopt(socket.IPPROTO_TCP, option, value)
    note, ended = make_note(), threading.Event()
    try:
        process = start_worker(channel, note)
        log.info("worker %d for %s", process.pid, peer)
        watch = threading.Thread(target=_end_with_pool, args=(channel, process, ended), daemon=True)
        watch.start()
        status = process.wait()
        ended.set()
        log.info("worker %d ended with status %d", process.pid, status)
        with contextlib.suppress(OSError):
            channel.settimeout(_LAST_WORD_S)
            channel.sendall(pack(ENDED, (True, (f"exit status {status}", read_note(note)))))
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)  # which ends the watch too
        watch.join()
    finally:
        os.close(note)


def _end_with_pool(
    channel: socket.socket, process: "subprocess.Popen[bytes]", ended: threading.Event
) -> None:
    """Wait until the pool shuts its side or is gone, then end the worker: one that is not in a call
    ends by itself, others are killed after ``_CLOSE_S``."""
    poller = select.poll()
    poller.register(channel, select.POLLRDHUP)
    poller.poll()
    if not ended.wait(_CLOSE_S):
        process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, listen, say where, serve."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_spear.rollout.env_server",
        description="Run environments for the controller of a run; `megatron-spear launch` starts "
        "it.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", required=True, help="address to listen at")
    parser.add_argument("--reached-at", help="address to tell others (default: that of --host)")
    parser.add_argument("--address-file", type=Path, required=True, help="gets host:port")
    parser.add_argument("--secret-file", type=Path, required=True, help="of the attempt")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        server = EnvironmentServer(options.host, read_secret(options.secret_file))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  (a program of its own)
        return 2
    host = options.reached_at or options.host
    host = f"[{host}]" if ":" in host else host
    write_whole(options.address_file, f"{host}:{server.port}")
    log.info("listening at %s:%d", host, server.port)
    server.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
