"""Children that end with us, and with all that they started."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_programs import python, runs, until, wait_until_gone

from megatron_spear.cluster.processes import (
    Child,
    adopting_orphans,
    children_of,
    descendants,
    end_noted,
    process_table,
)

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"],
                         start_new_session="session" in sys.argv)
print(child.pid, flush=True)
time.sleep(0.0 if "dies" in sys.argv else 60)
"""
IGNORES = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""


def start(tmp_path: Path, program: str, *arguments: object) -> Child:
    return Child(python(program, *arguments).line, os.environ, tmp_path / "log")


async def first_line(child: Child) -> str:
    await until(child.last_words)
    return child.last_words()[0]


def test_status_fate_and_last_words(tmp_path: Path) -> None:
    async def live() -> None:
        child = start(tmp_path, "print('one\\n\\ntwo'); raise SystemExit(3)")
        assert await child.wait() == 3
        assert (child.fate, child.last_words()) == ("exited with 3", ["one", "two"])
        again = start(tmp_path, SLEEPER)
        await first_line(again)
        assert (again.status, again.fate) == (None, "still runs")
        os.kill(again.pid, signal.SIGKILL)
        await again.wait()
        assert again.fate == "ended by SIGKILL"
        assert again.last_words() == ["up"], "not what an earlier start has written"

    asyncio.run(live())


def test_of_what_torchrun_adds_the_first_failure_is_told(tmp_path: Path) -> None:
    where = "torch/distributed/elastic/x.py:9]"
    failure = f"E1127 00:00:01.1 7 {where} failed (exitcode: -9) local_rank: 1 (pid: 8)"
    log = ["cause", f"W1127 00:00:01.0 7 {where} Sending SIGTERM", "peer", failure, "Traceback"]

    async def live() -> list[str]:
        child = start(tmp_path, f"print({chr(10).join(log)!r})")
        await child.wait()
        return child.last_words()

    assert asyncio.run(live()) == ["cause", "peer", failure]


@pytest.mark.parametrize("how", ["stays", "session", "dies"])
@pytest.mark.parametrize("ours", [signal.SIG_DFL, signal.SIG_IGN], ids=["", "ignored by us"])
def test_all_that_it_started_is_ended(tmp_path: Path, how: str, ours: signal.Handlers) -> None:
    signal.signal(signal.SIGTERM, ours)  # put back by ``unchanged_signals``

    async def live() -> int:
        child = start(tmp_path, PARENT, how)
        grandchild = int(await first_line(child))
        if how == "dies":
            await child.wait()
        assert runs(grandchild)
        await child.end(60.0)
        assert not runs(child.pid)
        return grandchild

    began = time.monotonic()
    wait_until_gone(asyncio.run(live()))
    assert time.monotonic() - began < 50.0, "SIGTERM was enough"


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def live() -> None:
        child = start(tmp_path, IGNORES)
        await first_line(child)
        await child.end(0.3)
        assert child.fate == "ended by SIGKILL"

    asyncio.run(live())


def test_children_ignore_sigusr1_until_they_handle_it(tmp_path: Path) -> None:
    async def live() -> None:
        child = start(tmp_path, SLEEPER)
        os.kill(child.pid, signal.SIGUSR1)
        await first_line(child)
        os.kill(child.pid, signal.SIGUSR1)
        await asyncio.sleep(0.05)
        assert child.status is None
        await child.end(1.0)

    asyncio.run(live())


@pytest.mark.parametrize("knows", [True, False])
def test_a_process_whose_parent_has_died_already_ends(tmp_path: Path, knows: bool) -> None:
    """It was still being imported when that happened."""
    program = f"""
import os, time
from pathlib import Path
from megatron_spear.cluster.processes import end_with_parent
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    Path({str(tmp_path / "orphan")!r}).write_text(str(os.getpid()))
    end_with_parent(parent=parent if {knows} or os.getppid() != 1 else None)
    time.sleep(60)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    deadline = time.monotonic() + 30
    while not (text := _read(tmp_path / "orphan")) and time.monotonic() < deadline:
        time.sleep(0.02)
    wait_until_gone(int(text))


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_children_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = f"""
import os, time
from pathlib import Path
from megatron_spear.cluster.processes import Child
command = [{sys.executable!r}, "-S", "-c", {SLEEPER!r}]
child = Child(command, os.environ, Path({str(tmp_path)!r}, "log"))
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    assert runs(child)
    parent.kill()
    parent.wait()
    wait_until_gone(child)


def test_what_an_earlier_launch_noted_is_ended_and_nothing_else(tmp_path: Path) -> None:
    """A note of another boot, and one whose pid is another process's by now, cost nobody's life."""
    stale, other = (
        subprocess.Popen([sys.executable, "-S", "-c", SLEEPER], start_new_session=True)
        for _ in range(2)
    )
    own = start(tmp_path, SLEEPER)
    files = {name: tmp_path / name for name in ("stale", "boot", "reused", "own", "torn", "gone")}
    own.note(files["own"])
    record = json.loads(files["own"].read_text())
    started = {p: process_table()[p].started for p in (stale.pid, other.pid)}
    write(files["stale"], record, pid=stale.pid, started=started[stale.pid])
    write(files["boot"], record, pid=other.pid, started=started[other.pid], boot="earlier")
    write(files["reused"], record, pid=other.pid, started=started[other.pid] - 1)
    files["torn"].write_text('{"pid": ')
    try:
        found = asyncio.run(end_noted(files.values(), 1.0))
        assert found == [stale.pid]
        wait_until_gone(stale.pid)
        assert runs(other.pid)
        assert runs(own.pid)
    finally:
        for process in (stale, other):
            process.kill()
            process.wait()
        asyncio.run(own.end(0.0))


def write(file: Path, record: dict, **changes: object) -> None:
    file.write_text(json.dumps(record | changes))


def test_the_process_table_knows_this_process_and_its_children(tmp_path: Path) -> None:
    async def live() -> None:
        child = start(tmp_path, SLEEPER)
        table = process_table()
        assert (table[child.pid].parent, table[child.pid].is_zombie) == (os.getpid(), False)
        assert {os.getpid(), child.pid} <= descendants([os.getppid()], table)
        assert child.pid in children_of(os.getpid())
        await child.end(1.0)
        assert child.pid not in children_of(os.getpid())

    asyncio.run(live())


@pytest.mark.parametrize("how", ["stays", "dies"])
def test_offspring_is_ended_and_what_was_there_before_is_not(tmp_path: Path, how: str) -> None:
    async def live() -> None:
        before = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        ended_before = subprocess.Popen([sys.executable, "-S", "-c", ""])
        try:
            with adopting_orphans() as offspring:
                child = start(tmp_path, PARENT, how, "session")
                grandchild = int(await first_line(child))
                await until(lambda: process_table()[ended_before.pid].is_zombie)
                offspring.reap()
                assert runs(grandchild)
                await offspring.end(1.0)
                assert not runs(child.pid) and not runs(grandchild)
            assert ended_before.wait() == 0, "its exit status is not ours to take"
            assert before.poll() is None
        finally:
            before.kill()
            before.wait()

    asyncio.run(live())
