"""Engine servers and environment workers: started, registered, watched, started again."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import time
from pathlib import Path

from fake_programs import NODE, SERVER, TIMES, new_attempt, python, runs, until

from megatron_spear.cluster.commands import Command
from megatron_spear.cluster.keepers import Site, keep
from megatron_spear.cluster.kept import EngineProcess, EnvironmentProcess, free_port
from megatron_spear.cluster.registry import registrations

DIES = "print('what it died of'); raise SystemExit(7)"
SILENT = "import time; time.sleep(60)"
WORKER = """
import sys, time
from pathlib import Path
Path(sys.argv[1] + ".tmp").write_text("127.0.0.1:77\\n")
Path(sys.argv[1] + ".tmp").rename(sys.argv[1])
time.sleep(60)
"""


class Scene:
    """A site, what was said on it, and engines of a program."""

    def __init__(self, tmp_path: Path, **times: float) -> None:
        self.attempt = new_attempt(tmp_path)
        self.said: list[str] = []
        self.times = dataclasses.replace(TIMES, **times)
        self.site = Site(
            attempt=self.attempt,
            node=NODE,
            times=self.times,
            say=self.said.append,
            environment=os.environ,
        )

    def engine(self, program: str, *words: object, **changes) -> EngineProcess:
        async def start(port: int) -> Command:
            return python(program, port, *words)

        settings = {
            "address": "127.0.0.1",
            "health_path": "/model_info",
            "max_restarts": 2,
            "start_deadline_s": 60.0,
            "times": self.times,
        }
        return EngineProcess(3, start, **settings | changes)

    def registered(self, role: str = "engine"):
        return registrations(self.attempt.registry, role)

    def launches(self, role: str = "engine") -> list[int]:
        return [found.launch for found in self.registered(role)]

    def told(self, words: str) -> int:
        return sum(words in line for line in self.said)

    @contextlib.asynccontextmanager
    async def kept(self, process):
        task = asyncio.create_task(keep(process, self.site))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def test_an_engine_is_registered_once_it_answers_and_gone_when_it_ends(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        async with scene.kept(scene.engine(SERVER, "child")):
            await until(scene.registered)
            (found,) = scene.registered()
            assert (found.index, found.node, found.launch) == (3, "n0", 0)
            assert found.address.startswith("http://127.0.0.1:")
            assert runs(found.pid)
            assert scene.attempt.pid_files("n0")
        assert scene.registered() == []
        assert not runs(found.pid)

    asyncio.run(live())


def test_a_killed_engine_comes_back_at_another_port(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        async with scene.kept(scene.engine(SERVER)):
            await until(scene.registered)
            (first,) = scene.registered()
            os.kill(first.pid, signal.SIGKILL)
            await until(lambda: scene.launches() == [1])
            (second,) = scene.registered()
            assert second.address != first.address
            assert scene.told("engine 3 ended by SIGKILL") == 1
            assert scene.told("started again (restart 1)") == 1

    asyncio.run(live())


def test_a_hung_engine_that_ignores_sigterm_is_killed_and_started_again(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        async with scene.kept(scene.engine(SERVER, "stubborn")):
            await until(scene.registered)
            (first,) = scene.registered()
            os.kill(first.pid, signal.SIGSTOP)
            await until(lambda: scene.launches() == [1])
            assert not runs(first.pid)
            assert scene.told("engine 3 hangs, 2 health checks failed") == 1

    asyncio.run(live())


def test_one_missed_health_check_is_forgiven(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, max_misses=1000)
        async with scene.kept(scene.engine(SERVER)):
            await until(scene.registered)
            (first,) = scene.registered()
            os.kill(first.pid, signal.SIGSTOP)
            await asyncio.sleep(0.6)
            os.kill(first.pid, signal.SIGCONT)
            await asyncio.sleep(0.1)
            assert scene.registered() == [first]

    asyncio.run(live())


def test_an_engine_that_dies_at_once_has_its_budget_and_says_why(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        await asyncio.wait_for(keep(scene.engine(DIES), scene.site), 60)
        assert scene.told("exited with 7 before it served\n    what it died of") == 3
        assert scene.said[-1] == "engine 3 stays away: it has been started again 2 times"

    asyncio.run(live())


def test_pauses_between_restarts_grow(tmp_path: Path) -> None:
    async def live() -> float:
        scene = Scene(tmp_path, pause_s=0.2, max_pause_s=0.5)
        began = time.monotonic()
        await asyncio.wait_for(keep(scene.engine(DIES, max_restarts=3), scene.site), 60)
        return time.monotonic() - began

    assert asyncio.run(live()) > 0.2 + 0.4 + 0.5


def test_an_engine_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        silent = scene.engine(SILENT, max_restarts=0, start_deadline_s=0.2)
        await asyncio.wait_for(keep(silent, scene.site), 60)
        assert scene.told("did not answer within 0.2 s") == 1

    asyncio.run(live())


def test_a_port_that_was_taken_meanwhile_costs_one_start(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = iter([taken.getsockname()[1], free_port()])
            # Nobody answers at the taken port: what listens there accepts and says nothing.
            engine = scene.engine(SERVER, choose_port=lambda: next(ports))
            async with scene.kept(engine):
                await until(scene.registered)
        assert scene.told("Address already in use") == 1

    asyncio.run(live())


def test_a_python_that_is_missing_costs_the_engine_alone(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)

        async def start(port: int) -> Command:
            return Command(line=("/no/such/python",))

        engine = scene.engine(DIES, max_restarts=1)
        engine._start = start
        await asyncio.wait_for(keep(engine, scene.site), 60)
        assert scene.told("engine 3 cannot be started: [Errno 2] No such file") == 2

    asyncio.run(live())


def test_a_worker_is_registered_by_the_address_it_writes_and_always_restarted(
    tmp_path: Path,
) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        file = tmp_path / "addresses" / "environment_0"
        worker = EnvironmentProcess(
            0, python(WORKER, file), file, deadline_s=60.0, times=scene.times
        )
        async with scene.kept(worker):
            for launch in range(4):
                await until(lambda launch=launch: scene.launches("environment") == [launch])
                (found,) = scene.registered("environment")
                assert found.address == "127.0.0.1:77"
                os.kill(found.pid, signal.SIGKILL)

    asyncio.run(live())


def test_the_address_of_an_earlier_start_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        file = tmp_path / "environment_0"
        file.write_text("127.0.0.1:1\n")
        worker = EnvironmentProcess(0, python(SILENT), file, deadline_s=0.2, times=scene.times)
        async with scene.kept(worker):
            await until(lambda: scene.told("wrote no address within 0.2 s"))
            assert scene.registered("environment") == []

    asyncio.run(live())
