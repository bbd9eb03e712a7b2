"""A supervisor with small programs in place of torchrun and servers: how a node ends, and stops."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_programs import NODE, SERVER, TIMES, TORCHRUN, new_attempt, python, runs, until

from megatron_spear.cluster.attempt import Attempt
from megatron_spear.cluster.keepers import Node
from megatron_spear.cluster.processes import children_of, process_table
from megatron_spear.cluster.registry import registrations
from megatron_spear.cluster.restarts import Verdict, judge
from megatron_spear.cluster.stop import StopSignals
from megatron_spear.cluster.supervisor import Starts, Supervisor
from megatron_spear.config.load import load_config
from megatron_spear.trainer.run_directory import RunDirectory

SERVERS = ("rollout.engine=sglang", "cluster.servers.count=1")


class Scene:
    """A run with one supervisor a node, all in this process."""

    def __init__(
        self, tmp_path: Path, *settings: str, deaf_s: float = 0.0, grace_s: float = TIMES.grace_s
    ) -> None:
        self.folder = tmp_path / "ranks"
        self.folder.mkdir()
        self.attempt = new_attempt(tmp_path)
        self.config = load_config(None, settings)
        self.stop = StopSignals()
        self.said: list[str] = []
        self.deaf_s = deaf_s
        self.times = dataclasses.replace(TIMES, grace_s=grace_s)
        self.meetings: list[tuple[str, int]] = []

    def supervisor(self, index: int = 0, attempt: Attempt | None = None) -> Supervisor:
        return Supervisor(
            self.config,
            attempt or self.attempt,
            Node(index=index, name=f"n{index}", address="127.0.0.1"),
            stop=self.stop,
            say=self.said.append,
            times=self.times,
            starts=Starts(
                trainer=self._trainer,
                engine=lambda number, model, port: python(SERVER, port, "stubborn"),
                environment=lambda number, file: python("import time; time.sleep(60)"),
            ),
        )

    def _trainer(self, meeting: tuple[str, int]):
        self.meetings.append(meeting)
        return python(TORCHRUN, self.folder, self.deaf_s)

    @contextlib.asynccontextmanager
    async def running(self, *nodes: int) -> AsyncIterator[list["asyncio.Task[int]"]]:
        """The supervisors of these nodes; nothing is left afterwards."""
        before = children_of(os.getpid())
        tasks = [asyncio.create_task(self.supervisor(index).run()) for index in nodes]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert set(children_of(os.getpid())) <= set(before)

    async def ranks(self, count: int = 2) -> list[int]:
        """The pids of so many ranks, once they have their handlers."""
        await until(lambda: len(self._pids()) >= count)
        return self._pids()

    def _pids(self) -> list[int]:
        return [int(path.name.split("-")[1]) for path in self.folder.glob("rank-*")]

    def end_ranks(self, status: int) -> None:
        (self.folder / "end.tmp").write_text(str(status))
        (self.folder / "end.tmp").rename(self.folder / "end")

    def told(self, words: str) -> bool:
        return any(words in line for line in self.said)


async def ended(task: "asyncio.Task[int]") -> int:
    return await asyncio.wait_for(asyncio.shield(task), 60)


def test_a_node_ends_well_when_its_ranks_do_and_servers_stay_until_then(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, *SERVERS)
        async with scene.running(0) as (task,):
            await scene.ranks()
            assert registrations(scene.attempt.registry, "engine") == [], "no model is known yet"
            scene.attempt.tell_model(tmp_path)
            await until(lambda: registrations(scene.attempt.registry, "engine"))
            (meeting,) = registrations(scene.attempt.registry, "trainer")
            assert meeting.address == "{}:{}".format(*scene.meetings[0])
            scene.end_ranks(0)
            assert await ended(task) == 0
            assert scene.attempt.num_done() == 1
            assert registrations(scene.attempt.registry, "engine") == []

    asyncio.run(live())


def test_a_rank_that_fails_ends_the_node_with_its_cause(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, *SERVERS)
        async with scene.running(0) as (task,):
            scene.attempt.tell_model(tmp_path)
            await scene.ranks()
            await until(lambda: registrations(scene.attempt.registry, "engine"))
            scene.end_ranks(5)
            assert await ended(task) == 5
        assert scene.told("trainer exited with 5\n    last words of a rank\n")
        assert not scene.told("much more of torchrun")
        assert scene.attempt.num_done() == 0
        assert scene.attempt.failures() == ["trainer_0: trainer ranks ended with status 5"]

    asyncio.run(live())


def test_settings_that_cannot_work_have_a_status_of_their_own(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        async with scene.running(0) as (task,):
            await scene.ranks()
            scene.attempt.mark_hopeless("no such game")
            scene.end_ranks(1)
            assert await ended(task) == 2

    asyncio.run(live())


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_to_the_ranks_and_not_to_torchrun(
    tmp_path: Path, number: signal.Signals
) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        async with scene.running(0) as (task,):
            await scene.ranks()
            scene.stop.request(number)
            assert await ended(task) == 0
            assert (scene.folder / "stopped").exists()
            assert scene.told(f"{number.name}: the ranks save and stop")

    asyncio.run(live())


def test_a_signal_before_the_ranks_can_hear_it_is_repeated(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, deaf_s=0.4)
        scene.stop.request(signal.SIGTERM)
        async with scene.running(0) as (task,):
            assert await ended(task) == 0
            assert (scene.folder / "stopped").exists()

    asyncio.run(live())


def test_a_run_that_another_process_still_holds_is_waited_for(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, "cluster.trainer_nodes=2")
        with RunDirectory(scene.attempt.run).alone():
            async with scene.running(0, 1) as tasks:
                await until(lambda: scene.told("another process still holds this run"))
                assert [await ended(task) for task in tasks] == [1, 1]
        assert [line for line in scene.said if "still holds" in line] == scene.said[:1]
        assert scene.told("another process holds this run, for 0.3 s now")
        assert scene.meetings == [], "nothing was started on any node"
        judgement = judge(scene.attempt, 1, scene.config.cluster)
        assert judgement.verdict is Verdict.AGAIN and "crashed with status 1" in judgement.reason

    asyncio.run(live())


def test_a_run_that_becomes_free_in_time_begins(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        scene.times = dataclasses.replace(scene.times, lock_s=30.0)
        with contextlib.ExitStack() as held:
            held.enter_context(RunDirectory(scene.attempt.run).alone())
            async with scene.running(0) as (task,):
                await until(lambda: scene.told("waiting up to 30 s"))
                assert scene.meetings == []
                held.close()
                await scene.ranks()
                scene.end_ranks(0)
                assert await ended(task) == 0

    asyncio.run(live())


def test_a_stop_while_another_process_holds_the_run_is_a_stop(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        scene.times = dataclasses.replace(scene.times, lock_s=30.0)
        with RunDirectory(scene.attempt.run).alone():
            async with scene.running(0) as (task,):
                await until(lambda: scene.told("waiting up to 30 s"))
                scene.stop.request(signal.SIGUSR1)
                await ended(task)
        stopped = json.loads(scene.attempt.stopped_file.read_text())
        assert stopped == {"reason": "SIGUSR1 before it began", "step": 0}

    asyncio.run(live())


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    """Also what would take its time: a server that ignores SIGTERM."""

    async def live() -> float:
        scene = Scene(tmp_path, *SERVERS, deaf_s=600, grace_s=60.0)
        scene.attempt.tell_model(tmp_path)
        async with scene.running(0) as (task,):
            await until(lambda: registrations(scene.attempt.registry, "engine"))
            scene.stop.request(signal.SIGINT)
            await asyncio.sleep(0.1)
            assert not task.done()
            scene.stop.request(signal.SIGINT)
            began = time.monotonic()
            assert await ended(task) == 130
            return time.monotonic() - began

    assert asyncio.run(live()) < 30.0


def test_all_nodes_end_well_together_and_the_second_meets_at_the_first(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, *SERVERS, "cluster.trainer_nodes=2", "cluster.engine_nodes=1")
        async with scene.running(0, 1, 2) as tasks:
            scene.attempt.tell_model(tmp_path)
            await scene.ranks(4)
            assert len(set(scene.meetings)) == 1
            await until(lambda: registrations(scene.attempt.registry, "engine"))
            assert registrations(scene.attempt.registry, "engine")[0].node == "n2"
            scene.end_ranks(0)
            assert [await ended(task) for task in tasks] == [0, 0, 0]

    asyncio.run(live())


def test_one_node_that_fails_ends_the_others(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, *SERVERS, "cluster.trainer_nodes=2", "cluster.engine_nodes=1")
        async with scene.running(1, 2) as tasks:
            scene.attempt.mark_failed("trainer", 0, "trainer ranks ended with status 1")
            assert [await ended(task) for task in tasks] == [1, 1]
        assert scene.told("another has failed: trainer_0: trainer ranks ended with status 1")

    asyncio.run(live())


def test_a_node_that_hears_nothing_of_the_first_gives_up(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path, "cluster.trainer_nodes=2")
        async with scene.running(1) as (task,):
            assert await ended(task) == 1
        assert scene.told("node 0 has not said within 2 s where the ranks meet")
        assert scene.attempt.failures()

    asyncio.run(live())


def test_trainers_without_a_sign_of_life_end_the_wait_for_a_model(tmp_path: Path) -> None:
    settings = ("cluster.engine_nodes=1", "cluster.servers.start_deadline_s=0.1")

    async def live() -> None:
        scene = Scene(tmp_path, *SERVERS, *settings, "run.hang_limit_s=0.3")
        async with scene.running(1) as (task,):
            assert await ended(task) == 1
        assert scene.told("the trainers gave no model and no sign of life for 0.3 s")

    asyncio.run(live())


def test_what_an_earlier_attempt_left_on_this_node_is_ended_first(tmp_path: Path) -> None:
    async def live() -> None:
        scene = Scene(tmp_path)
        stale = _left_behind(scene.attempt, NODE.name)
        elsewhere = _left_behind(scene.attempt, "another")
        attempt = Attempt.begin(scene.attempt.run)
        scene.end_ranks(0)
        try:
            assert await scene.supervisor(attempt=attempt).run() == 0
            assert not runs(stale)
            assert scene.told(f"ended what an earlier attempt has left: pids [{stale}]")
            assert runs(elsewhere), "it is another node's"
        finally:
            for pid in (stale, elsewhere):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    asyncio.run(live())


ORPHAN = """
import subprocess, sys
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
print(subprocess.Popen(sys.argv[1:], start_new_session=True, **quiet).pid)
"""


def _left_behind(attempt: Attempt, node: str) -> int:
    """A process as a killed supervisor leaves it: an orphan with a note."""
    line = python(ORPHAN, *python("import time; time.sleep(60)").line).line
    pid = int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    file = attempt.pid_file(node, "engine", 0)
    file.parent.mkdir(parents=True)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file.write_text(json.dumps({"pid": pid, "started": process_table()[pid].started, "boot": boot}))
    return pid
