"""The supervisor of one node: starts what the node's roles need, looks after it, and ends it all.

    trainer ranks  --die-->      this node fails, and says so to the others: the attempt ends
    engine server  --dies-->     started again within its budget (keepers.py); the run goes on
    all trainer nodes have ended well --> every node ends well
    SIGUSR1, SIGTERM, SIGINT --> the ranks save and stop; servers stay until they have

It imports no torch: what it costs a node is in docs/launch.md.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_spear
from megatron_spear.cluster import commands
from megatron_spear.cluster.attempt import Attempt, attempts, newest_checkpoint
from megatron_spear.cluster.commands import Command
from megatron_spear.cluster.keepers import Node, NotReady, Site, Times, keep
from megatron_spear.cluster.kept import (
    HEALTH_PATHS,
    EngineProcess,
    EnvironmentProcess,
    free_port,
)
from megatron_spear.cluster.processes import (
    Child,
    Offspring,
    adopting_orphans,
    children_of,
    end_noted,
)
from megatron_spear.cluster.registry import Registration, register, registrations
from megatron_spear.cluster.restarts import USAGE_STATUS
from megatron_spear.cluster.roles import NodeRoles, roles_of
from megatron_spear.cluster.run_lock import until_free
from megatron_spear.cluster.stop import StopSignals
from megatron_spear.config.schema import RunConfig
from megatron_spear.errors import StopRequested, describe

FAILED_EXIT = 1
"""Another node has failed, or did not end."""
AT_ONCE_EXIT = 130
"""A second SIGINT."""


@dataclass(frozen=True, kw_only=True)
class Starts:
    """The command lines of a node's processes: torchrun for where all ranks meet, a server of a
    model at a port, an environment worker that writes its address into a file."""

    trainer: Callable[[tuple[str, int]], Command]
    engine: Callable[[int, Path, int], Command]
    environment: Callable[[int, Path], Command]


class Supervisor:
    """One node of an attempt; ``run`` gives its exit status. ``say`` takes lines for the user."""

    def __init__(
        self,
        config: RunConfig,
        attempt: Attempt,
        node: Node,
        *,
        stop: StopSignals,
        say: Callable[[str], None],
        times: Times | None = None,
        starts: Starts | None = None,
    ) -> None:
        self._config, self._attempt, self._node, self._stop = config, attempt, node, stop
        self._roles = roles_of(config.cluster, node.index)
        self._times = times or Times()
        self._starts = starts or _starts(config, attempt, node, self._roles)
        self._site = Site(
            attempt=attempt, node=node, times=self._times, say=say, environment=os.environ
        )
        self._ended_at: float | None = None  # when this node's ranks had ended well
        self._failed_at: float | None = None  # when another failure was seen

    async def run(self) -> int:
        """Everything from the first start to the last end; nothing is left behind."""
        with adopting_orphans() as offspring:
            return await self._run(offspring)

    async def _run(self, offspring: Offspring) -> int:
        await self._sweep()
        tasks = [asyncio.create_task(work) for work in self._work()]
        try:
            return await self._until_over(tasks, offspring)
        except Exception as error:
            with suppress(OSError):
                self._attempt.mark_failed("node", self._node.index, describe(error))
            raise
        finally:
            for task in tasks:
                task.cancel()
            if self._stop.at_once:
                await offspring.end(0.0)
            await asyncio.gather(*tasks, return_exceptions=True)
            await offspring.end(self._times.grace_s)

    def _work(self) -> list[Coroutine[Any, Any, Any]]:
        """All that runs side by side."""
        roles, cluster, times = self._roles, self._config.cluster, self._times
        work: list[Coroutine[Any, Any, Any]] = [self._train()] if roles.num_ranks else []
        for index in roles.engines:
            engine = EngineProcess(
                index,
                self._engine_start(index),
                address=self._node.address,
                health_path=HEALTH_PATHS[cluster.servers.program],
                max_restarts=cluster.servers.max_restarts,
                start_deadline_s=cluster.servers.start_deadline_s,
                times=times,
            )
            work.append(keep(engine, self._site))
        for index in roles.environments:
            file = self._attempt.address_file(index)
            worker = EnvironmentProcess(
                index,
                self._starts.environment(index, file),
                file,
                deadline_s=times.meet_s,
                times=times,
            )
            work.append(keep(worker, self._site))
        return work

    async def _sweep(self) -> None:
        """End what earlier attempts of this run have left on this node."""
        earlier = [a for a in attempts(self._attempt.run) if a.number < self._attempt.number]
        files = [file for attempt in earlier for file in attempt.pid_files(self._node.name)]
        found = await end_noted(files, self._times.grace_s)
        if found:
            self._site.say(f"ended what an earlier attempt has left: pids {found}")

    async def _until_over(self, tasks: list["asyncio.Task[Any]"], offspring: Offspring) -> int:
        """Look at everything again and again; gives the exit status once there is one."""
        look_at_files = 0.0
        while True:
            if self._stop.at_once:
                self._site.say("stopped at once; what came after the last checkpoint is lost")
                return AT_ONCE_EXIT
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    task.result()
            training = tasks[0] if self._roles.num_ranks else None
            ended_now = training is not None and training.done() and self._ended_at is None
            if ended_now or time.monotonic() >= look_at_files:
                offspring.reap()
                status = self._verdict(training)
                if status is not None:
                    return status
                look_at_files = time.monotonic() + self._times.files_s
            await asyncio.sleep(self._times.look_s)

    def _verdict(self, training: "asyncio.Task[int] | None") -> int | None:
        """The exit status that this and the other nodes' files say; None while the run goes on."""
        attempt, index = self._attempt, self._node.index
        if training is not None and training.done() and self._ended_at is None:
            if status := training.result():
                attempt.mark_failed("trainer", index, f"trainer ranks ended with status {status}")
                return USAGE_STATUS if attempt.hopeless_file.exists() else status
            attempt.mark_done(index)
            self._ended_at = time.monotonic()
        if failures := attempt.failures():
            self._failed_at = self._failed_at or time.monotonic()
            going = training is not None and not training.done()
            if not going or time.monotonic() - self._failed_at > self._times.linger_s:
                self._site.say(f"ends because another has failed: {'; '.join(failures)}")
                return FAILED_EXIT
            return None
        if attempt.num_done() >= self._config.cluster.trainer_nodes:
            return 0
        limit_s = self._config.run.hang_limit_s
        if self._ended_at is not None and time.monotonic() - self._ended_at > limit_s:
            self._site.say(f"other trainer nodes did not end within {limit_s:g} s after this one")
            return FAILED_EXIT
        return None

    async def _train(self) -> int:
        """The trainer ranks from start to end; their exit status. A stop is passed on to them."""
        site = self._site
        try:
            if self._node.index == 0:
                times = self._times
                await until_free(
                    self._attempt.run, times.lock_s, times.look_s, self._stop, site.say
                )
            meeting = await self._meeting_point()
        except TimeoutError as error:
            site.say(str(error))
            return FAILED_EXIT
        except StopRequested as stopped:
            self._attempt.mark_stopped(str(stopped), newest_checkpoint(self._attempt.run))
            return FAILED_EXIT  # nobody has done what the run is for
        child = site.start(self._starts.trainer(meeting), "trainer", self._node.index)
        site.say(f"trainer started: {self._roles.num_ranks} rank(s), log {child.log}")
        next_signal = 0.0
        try:
            while (status := child.status) is None:
                if self._stop.reason and time.monotonic() >= next_signal:
                    self._pass_on(child, first=not next_signal)
                    next_signal = time.monotonic() + self._times.signal_s
                await asyncio.sleep(self._times.look_s)
            if status:
                site.say_end("trainer", child.fate, child)
            return status if status >= 0 else 128 - status
        finally:
            await child.end(self._times.grace_s)

    def _pass_on(self, torchrun: Child, *, first: bool) -> None:
        """Ask each rank to save and stop, once more if it has been asked: a rank that was still
        starting did not hear it. torchrun itself would end its ranks."""
        if first:
            self._site.say(f"{self._stop.reason}: the ranks save and stop after this step")
        for rank in children_of(torchrun.pid):
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGUSR1)

    async def _meeting_point(self) -> tuple[str, int]:
        """Where all trainer ranks meet: node 0 chooses and says it, the others read it."""
        registry, node = self._attempt.registry, self._node
        if node.index == 0:
            port = free_port()
            register(
                registry,
                Registration(
                    role="trainer",
                    index=0,
                    address=f"{node.address}:{port}",
                    node=node.name,
                    pid=os.getpid(),
                ),
            )
            return node.address, port
        give_up = time.monotonic() + self._times.meet_s
        while not (found := registrations(registry, "trainer")):
            if time.monotonic() > give_up:
                why = f"node 0 has not said within {self._times.meet_s:g} s where the ranks meet"
                raise TimeoutError(why)
            await asyncio.sleep(self._times.files_s)
        host, _, port_text = found[0].address.rpartition(":")
        return host, int(port_text)

    def _engine_start(self, index: int) -> Callable[[int], Coroutine[Any, Any, Command]]:
        async def start(port: int) -> Command:
            return self._starts.engine(index, await self._model(), port)

        return start

    async def _model(self) -> Path:
        """The folder that servers start with, once the controller has said it.

        A warm start may take hours before. Trainers that give no sign of life for
        ``run.hang_limit_s`` end the attempt.
        """
        limit_s = self._config.run.hang_limit_s
        signs, since = _signs_of_life(self._attempt), time.monotonic()
        while (model := self._attempt.model()) is None:
            if (now := _signs_of_life(self._attempt)) != signs:
                signs, since = now, time.monotonic()
            if time.monotonic() - since > limit_s:
                why = f"the trainers gave no model and no sign of life for {limit_s:g} s"
                self._attempt.mark_failed("engine_node", self._node.index, why)
                raise NotReady(why)
            await asyncio.sleep(self._times.files_s)
        return model


def _signs_of_life(attempt: Attempt) -> set[tuple[str, int, int]]:
    """What changes when a trainer writes a heartbeat or a line, whichever way its clock jumps."""
    found = set()
    for file in [*attempt.heartbeats.glob("*"), *attempt.path.glob("log/*/trainer_*.log")]:
        with suppress(OSError):
            stat = file.stat()
            found.add((str(file), stat.st_mtime_ns, stat.st_size))
    return found


def _starts(config: RunConfig, attempt: Attempt, node: Node, roles: NodeRoles) -> Starts:
    """The real command lines."""
    host = commands.listen_host(node.address)
    processes = roles.num_ranks + len(roles.engines)
    threads = config.run.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(config.cluster.gpus_per_node)]

    def engine(index: int, model: Path, port: int) -> Command:
        place = commands.EnginePlace(
            local=index - roles.engines.start,
            host=host,
            port=port,
            gpus=gpus,
            threads=threads,
            package=_package_alone(attempt, node),
        )
        return commands.engine_command(config, model, place)

    return Starts(
        trainer=lambda master: commands.trainer_command(
            config, attempt.run, attempt.path, node.index, master
        ),
        engine=engine,
        environment=lambda index, file: commands.environment_command(
            node.address, file, attempt.secret_file
        ),
    )


def _package_alone(attempt: Attempt, node: Node) -> Path:
    """A folder in which this package is and nothing else, for the PYTHONPATH of servers with an
    environment of their own: next to an installed package lies all of its environment."""
    folder = attempt.path / "python" / node.name
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / "megatron_spear").symlink_to(Path(megatron_spear.__file__).parent)
    return folder
