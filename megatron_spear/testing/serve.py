"""A server of the embedded engine for a test: in a thread, or in a process of its own.

    with serve_in_thread(folder) as url:
        answer = requests.post(f"{url}/generate", json={...})

A thread starts at once and shares this process; a process can be killed, and is what a broadcast
needs whose other side is this process.
"""

import asyncio
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_spear.rollout.event_loop import EventLoop
from megatron_spear.serving.server import serve
from megatron_spear.serving.state import ServeSettings

_START_S = 120.0
_STOP_S = 20.0
_SMALL: dict[str, Any] = {"port": 0, "max_slots": 8, "max_context": 256, "threads": 1}


@contextmanager
def serve_in_thread(model: Path | str, **settings: Any) -> Iterator[str]:
    """The URL of a server in this process; ``settings`` are those of ``ServeSettings``.

    Small ones by default: a free port, 8 slots of 256 tokens, one thread.
    """
    chosen = ServeSettings(model=Path(model), **_SMALL | settings)
    urls: queue.Queue[str | BaseException] = queue.Queue()
    with EventLoop("serve") as loop:
        stop = asyncio.Event()

        async def live() -> None:
            try:
                await serve(chosen, urls.put, stop)
            except BaseException as error:
                urls.put(error)
                raise

        async def end() -> None:
            stop.set()

        serving = loop.start(live())
        url = urls.get(timeout=_START_S)
        if isinstance(url, BaseException):
            raise url
        try:
            yield url
        finally:
            loop.run(end())
            serving.result(_STOP_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedProcess:
    """A server in a process of its own."""

    url: str
    process: "subprocess.Popen[str]"


@contextmanager
def serve_in_process(model: Path | str, *options: object) -> Iterator[ServedProcess]:
    """``megatron-spear serve MODEL OPTIONS`` at a free port, ended at the end."""
    small = ["--port", 0, "--max-slots", 8, "--max-context", 256, "--threads", 1]
    words = [sys.executable, "-m", "megatron_spear.cli.main", "serve", model, *small, *options]
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        yield ServedProcess(url=_url_told_by(process), process=process)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _url_told_by(process: "subprocess.Popen[str]") -> str:
    """The URL of the line that says that the server is ready."""
    lines: queue.Queue[str] = queue.Queue()
    out = process.stdout
    assert out is not None
    threading.Thread(target=lambda: lines.put(out.readline()), daemon=True).start()
    line = lines.get(timeout=_START_S)
    if not line:
        raise RuntimeError(f"the server ended with status {process.wait(_STOP_S)} before it served")
    return line.split()[-1]
