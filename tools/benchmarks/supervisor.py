"""What the supervisor of a node costs: CPU seconds a minute, memory, seconds from a death to the
restart. Servers and ranks are small programs, so that nothing else takes time.

    python tools/benchmarks/supervisor.py [--engines 8] [--workers 8] [--seconds 60]
"""

import argparse
import asyncio
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.commands import Command
from megatron_spear.cluster.keepers import Node
from megatron_spear.cluster.registry import Registration, registrations
from megatron_spear.cluster.stop import StopSignals
from megatron_spear.cluster.supervisor import Starts, Supervisor
from megatron_spear.config.load import load_config

SERVER = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        with listener.accept()[0] as caller:
            caller.recv(65536)
            caller.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
"""
WORKER = """
import sys, time
from pathlib import Path
Path(sys.argv[1]).write_text("127.0.0.1:1")
time.sleep(3600)
"""
SLEEPER = "import time; time.sleep(3600)"


def main() -> None:
    """Run one supervisor for some time and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--engines", type=int, default=8, help="servers of the node")
    parser.add_argument("--workers", type=int, default=8, help="environment workers of the node")
    parser.add_argument("--seconds", type=float, default=60.0, help="time that is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_measure(Path(folder), options.engines, options.workers, options.seconds))


async def _measure(run: Path, engines: int, workers: int, seconds: float) -> None:
    attempt = Attempt.begin(run)
    attempt.tell_model(run)
    config = load_config(
        None,
        [
            "rollout.engine=sglang",
            f"cluster.servers.count={engines}",
            f"cluster.env_workers={workers}",
        ],
    )
    supervisor = Supervisor(
        config,
        attempt,
        Node(index=0, name="node", address="127.0.0.1"),
        stop=StopSignals(),
        say=lambda line: None,
        starts=Starts(
            trainer=lambda meeting: _python(SLEEPER),
            engine=lambda index, model, port: _python(SERVER, port),
            environment=lambda index, file: _python(WORKER, file),
        ),
    )
    task = asyncio.create_task(supervisor.run())
    try:
        await _until(lambda: len(registrations(attempt.registry, "engine")) == engines)
        await _until(lambda: len(registrations(attempt.registry, "environment")) == workers)
        before = _cpu_s()
        await asyncio.sleep(seconds)
        cpu_s = 60.0 * (_cpu_s() - before) / seconds
        print(f"{engines} servers and {workers} workers, {seconds:g} s")
        print(f"CPU seconds a minute    {cpu_s:.2f} ({cpu_s / 0.6:.2f} % of a core)")
        print(f"resident memory         {_resident_bytes() / 1e6:.0f} MB")
        print(f"torch is imported       {'torch' in sys.modules}")
        if engines:
            print(f"restart of a server     {await _restart_s(attempt):.1f} s after its death")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _restart_s(attempt: Attempt) -> float:
    """Seconds from the death of a server to its registration by the next start."""

    def first() -> Registration | None:
        return next(iter(registrations(attempt.registry, "engine")), None)

    victim = first()
    assert victim is not None
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    await _until(lambda: (now := first()) is not None and (now.index, now.launch) == (0, 1))
    return time.monotonic() - began


async def _until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.1)


def _python(program: str, *arguments: object) -> Command:
    return Command(line=(sys.executable, "-S", "-c", program, *map(str, arguments)))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
