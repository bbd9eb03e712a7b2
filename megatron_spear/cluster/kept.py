"""The two kinds of processes that are kept: engine servers and environment workers."""

import asyncio
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from megatron_spear.cluster.commands import Command
from megatron_spear.cluster.keepers import NotReady, Times
from megatron_spear.cluster.processes import Child
from megatron_spear.errors import EngineError
from megatron_spear.rollout.engines.http import JsonClient

HEALTH_PATHS = {"serve": "/model_info", "sglang": "/model_info", "vllm": "/health"}
"""What each program answers also while it is paused or takes weights, as SGLang's ``/health`` does
not."""


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


class EngineProcess:
    """An engine server; ``start`` gives the command line for a port, waiting for the model.

    Every start has a port of its own, since another process may have taken the one before.
    ``start_deadline_s`` is for loading included.
    """

    role = "engine"
    dies_by = signal.SIGTERM  # it has processes of its own to end

    def __init__(
        self,
        index: int,
        start: Callable[[int], Awaitable[Command]],
        *,
        address: str,
        health_path: str,
        max_restarts: int,
        start_deadline_s: float,
        times: Times,
        choose_port: Callable[[], int] = free_port,
    ) -> None:
        self.index = index
        self.max_restarts: int | None = max_restarts
        self._start = start
        self._address = address
        self._health_path = health_path
        self._start_deadline_s = start_deadline_s
        self._times = times
        self._choose_port = choose_port
        self._url = ""

    async def command(self) -> Command:
        """See ``Kept``."""
        port = self._choose_port()
        self._url = f"http://{self._address}:{port}"
        return await self._start(port)

    async def ready(self, child: Child) -> str:
        """See ``Kept``."""
        give_up = time.monotonic() + self._start_deadline_s
        while child.status is None:
            why = await self._problem()
            if not why:
                return self._url
            if time.monotonic() > give_up:
                raise NotReady(f"did not answer within {self._start_deadline_s:g} s: {why}")
            await asyncio.sleep(self._times.look_s)
        raise NotReady(f"{child.fate} before it served")

    async def unwell(self, child: Child) -> str:
        """See ``Kept``. One missed health check says little: the machine may be busy."""
        misses, next_probe = 0, time.monotonic() + self._times.probe_s
        while child.status is None:
            await asyncio.sleep(self._times.look_s)
            if time.monotonic() < next_probe:
                continue
            why = await self._problem()
            misses = misses + 1 if why else 0
            if misses == self._times.max_misses:
                return f"hangs, {misses} health checks failed: {why}"
            next_probe = time.monotonic() + self._times.probe_s
        return child.fate

    async def _problem(self) -> str:
        """What a health check found; empty if all is well."""
        client = JsonClient(self._url, deadline_s=self._times.probe_deadline_s)
        try:
            await client.get(self._health_path)
            return ""
        except EngineError as error:
            return str(error)
        finally:
            await client.close()


class EnvironmentProcess:
    """An environment worker, which writes its address into a file once it listens."""

    role = "environment"
    dies_by = signal.SIGKILL
    max_restarts: int | None = None

    def __init__(
        self, index: int, command: Command, address_file: Path, *, deadline_s: float, times: Times
    ) -> None:
        self.index = index
        self._command = command
        self._file = address_file
        self._deadline_s = deadline_s
        self._times = times

    async def command(self) -> Command:
        """See ``Kept``."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.unlink(missing_ok=True)  # that of an earlier start
        return self._command

    async def ready(self, child: Child) -> str:
        """See ``Kept``."""
        give_up = time.monotonic() + self._deadline_s
        while child.status is None:
            if self._file.exists() and (address := self._file.read_text(encoding="utf-8").strip()):
                return address
            if time.monotonic() > give_up:
                raise NotReady(f"wrote no address within {self._deadline_s:g} s")
            await asyncio.sleep(self._times.look_s)
        raise NotReady(f"{child.fate} before it listened")

    async def unwell(self, child: Child) -> str:
        """See ``Kept``."""
        await child.wait()
        return child.fate
