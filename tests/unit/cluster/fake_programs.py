"""Small programs that stand for torchrun, engine servers and environment workers, and how to wait
for what they do."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.commands import Command
from megatron_spear.cluster.keepers import Node, Times
from megatron_spear.cluster.processes import process_table

TIMES = Times(
    look_s=0.02,
    files_s=0.05,
    probe_s=0.05,
    probe_deadline_s=0.5,
    max_misses=2,
    pause_s=0.05,
    max_pause_s=0.2,
    settled_s=60.0,
    grace_s=0.5,
    signal_s=0.05,
    lock_s=0.3,
    meet_s=2.0,
    linger_s=0.3,
)
NODE = Node(index=0, name="n0", address="127.0.0.1")

SERVER = """
import os, signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else signal.SIG_DFL)
if "child" in sys.argv and os.fork() == 0:
    signal.pause()
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    print("serving", flush=True)
    while True:
        with listener.accept()[0] as caller:
            caller.recv(65536)
            caller.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
"""
"""Answers every request; ``stubborn`` ignores SIGTERM, ``child`` has a process of its own."""

TORCHRUN = """
import os, signal, subprocess, sys
rank = '''
import os, signal, sys, time
from pathlib import Path
def stop(number, frame):
    Path(sys.argv[1], "stopped").touch()
    os._exit(0)
time.sleep(float(sys.argv[2]))
signal.signal(signal.SIGUSR1, stop)
Path(sys.argv[1], f"rank-{os.getpid()}").touch()
while not Path(sys.argv[1], "end").exists():
    time.sleep(0.01)
sys.exit(int(Path(sys.argv[1], "end").read_text()))
'''
ranks = [
    subprocess.Popen([sys.executable, "-S", "-c", rank, *sys.argv[1:]], start_new_session=True)
    for _ in range(2)
]
status = max(rank.wait() for rank in ranks)
print("last words of a rank", flush=True)
print("E1127 00:00:00 1 torch/distributed/elastic/api.py:1] failed (exitcode: 5)", flush=True)
print("much more of torchrun", flush=True)
sys.exit(status)
"""
"""Two ranks that run until there is a file ``end`` in the first argument, with their exit status;
their handler of SIGUSR1 is there after the second argument's seconds."""


def python(program: str, *arguments: object) -> Command:
    """The command line of a program."""
    return Command(line=(sys.executable, "-S", "-c", program, *map(str, arguments)))


def new_attempt(tmp_path: Path) -> Attempt:
    """The first attempt of a run in a new folder."""
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    return Attempt.begin(run)


async def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    """Wait until the condition holds; TimeoutError after the limit."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    entry = process_table().get(pid)
    return entry is not None and not entry.is_zombie


def wait_until_gone(pid: int, limit_s: float = 60.0) -> None:
    """Fails where the process still runs after the limit."""
    end = time.monotonic() + limit_s
    while runs(pid):
        assert time.monotonic() < end, f"{pid} still runs"
        time.sleep(0.01)
