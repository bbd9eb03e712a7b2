"""Environment servers on this machine, for tests and benchmarks of workers reached by TCP."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_spear.rollout.env_handshake import read_secret
from megatron_spear.rollout.env_remote import RemoteWorkers

_START_S = 30.0


class LocalServer:
    """A process of ``rollout.env_server``; ``start`` may be called again after it has ended."""

    def __init__(self, folder: Path, secret_file: Path) -> None:
        self._address_file = folder / "address"
        self._secret_file = secret_file
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None, "start comes first"
        return self._process.pid

    def address(self) -> str | None:
        """``host:port``; None while there is none."""
        try:
            return self._address_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def start(self) -> None:
        """Start it; returns when it listens."""
        self._address_file.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "megatron_spear.rollout.env_server"),
                *("--host", "127.0.0.1", "--address-file", str(self._address_file)),
                *("--secret-file", str(self._secret_file)),
            ],
            stdin=subprocess.DEVNULL,
        )
        give_up = time.monotonic() + _START_S
        while self.address() is None:
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                raise RuntimeError("the environment server did not start; see its output")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it with SIGKILL, also where it is stopped; its workers end by themselves."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10.0)


def make_secret(folder: Path) -> Path:
    """A file with a secret that others may not read."""
    file = folder / "secret"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8") as secret:
        secret.write(os.urandom(32).hex())
    return file


@contextlib.contextmanager
def environment_server(folder: Path) -> Iterator[RemoteWorkers]:
    """How to reach a server that runs for the length of the block."""
    secret = make_secret(folder)
    server = LocalServer(folder, secret)
    server.start()
    try:
        yield RemoteWorkers(address=lambda index: server.address(), secret=read_secret(secret))
    finally:
        server.kill()
